"""Where bf16 weights come from: a model hub, a directory, or the demo package."""
