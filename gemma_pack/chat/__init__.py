"""Asking a model in this process: presets of speed and memory, sampling, a conversation, and a terminal for it."""
