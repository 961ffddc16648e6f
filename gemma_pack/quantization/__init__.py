"""From a bf16 checkpoint and a recipe to a variant, and the proof that nothing else changed."""

import os

# The libraries below log to stderr from the moment they are imported; what matters goes through the reporter.
os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
os.environ.setdefault("COMPRESSED_TENSORS_LOG_DISABLED", "true")
