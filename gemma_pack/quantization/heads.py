"""The head of a checkpoint: stored beside the embedding that it is tied to, or one of its own.

Gemma ties its head to the embedding and stores it once. Trainers that save every parameter store it again, and
what vLLM reads of such a copy differs: its Gemma3ForCausalLM skips it, its Gemma2ForCausalLM has no such name and ends
with a KeyError (`load_weights` of vllm/model_executor/models/gemma3.py and gemma2.py, vLLM 0.32).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gemma_pack.gemma import decoder_prefix, text_config

if TYPE_CHECKING:
    from gemma_pack.checkpoint import Checkpoint


def stored_heads(checkpoint: Checkpoint) -> set[str]:
    """Return the names of the head's weight: `lm_head.weight`, and what stands before it beside a vision tower."""
    return {name for name in checkpoint.tensors if re.search(r"(^|\.)lm_head\.weight$", name)}


def copied_heads(checkpoint: Checkpoint) -> set[str]:
    """Return those heads that are tied to the embedding and byte for byte the same, which no reader misses."""
    heads = stored_heads(checkpoint)
    config = checkpoint.config
    if not heads or not config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings", True)):
        return set()
    embedding = checkpoint.tensors[f"{decoder_prefix(checkpoint.tensors)}embed_tokens.weight"]
    tensors = {name: checkpoint.tensors[name] for name in heads}
    return {
        name
        for name, info in tensors.items()
        if (info.dtype, info.shape) == (embedding.dtype, embedding.shape) and info.digest() == embedding.digest()
    }
