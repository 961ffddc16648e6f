"""Random checkpoints in the exact shapes of Gemmas whose weights are not at hand: speed and memory are the same."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_pack.checkpoint import write_index
from gemma_pack.gemma import decoder_linears, linear_shape, norm_shapes
from gemma_pack.safetensors_file import read_header, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tokenizer of the tests' tiny models

GEMMA_2_9B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "dtype": "bfloat16",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256_000,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
"""config.json of google/gemma-2-9b-it, as Gemma 2's technical report (arXiv 2408.00118, table 1) gives the shapes."""
GEMMA_2_27B: dict[str, Any] = GEMMA_2_9B | {
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 144,
}
"""Of google/gemma-2-27b-it, likewise."""
TINY: dict[str, Any] = GEMMA_2_9B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}
_PATTERN = 1 << 24


def write_random(directory: Path, config: dict[str, Any]) -> Path:
    """Write a checkpoint of normal weights, a layer a shard, with the tokenizer of the tests' tiny models."""
    from tests.tiny import write_tokenizer

    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    pattern = (0.02 * torch.randn(_PATTERN, generator=generator)).bfloat16().view(torch.uint8).numpy().tobytes()
    layers = decoder_linears(config, "model.")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"])}
    shapes |= norm_shapes(config, "model.")
    shapes |= {f"{name}.weight": linear_shape(config, name) for layer in layers for group in layer for name in group}
    by_layer: dict[str, list[str]] = {}
    for name in shapes:
        by_layer.setdefault(name.partition("layers.")[2].partition(".")[0] or "embedding", []).append(name)
    infos = []
    for number, names in enumerate(by_layer.values(), 1):
        path = directory / f"model-{number:05}-of-{len(by_layer):05}.safetensors"
        write_safetensors(path, [(name, "BF16", shapes[name], _bytes(pattern, shapes[name])) for name in names])
        infos += read_header(path)
    write_index(directory, infos)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    write_tokenizer(directory)
    return directory


def _bytes(pattern: bytes, shape: tuple[int, ...]) -> Callable[[], bytes]:
    size = 2 * math.prod(shape)
    return lambda: (pattern * -(-size // len(pattern)))[:size]
