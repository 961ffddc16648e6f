"""What stands for a quantized linear layer on disk, by scheme: names, dtypes and shapes.

Written down from what the servers create and fill, not from what the packing code gives, so that each can be held
against the other: a shard's header is planned by this table, and the loader proof reads a finished variant by it.

Sources: `create_weights` of vLLM's compressed-tensors schemes (vllm/model_executor/layers/quantization/
compressed_tensors/schemes), and bitsandbytes' `Linear4bit._save_to_state_dict` and `Linear8bitLt._save_to_state_dict`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gemma_pack.gemma import checkpoint_linears
from gemma_pack.safetensors_file import DTYPE_BITS

if TYPE_CHECKING:
    from collections.abc import Collection

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.recipe import Recipe
    from gemma_pack.safetensors_file import TensorInfo

NF4_BLOCK: Final = 64
"""Weights that share an absmax (bitsandbytes' default for 4 bits)."""
NF4_NESTED_BLOCK: Final = 256
"""Absmax values that share an absmax of their own: double quantization (`quantize_4bit` in bitsandbytes)."""
NF4_STATE_BYTES: Final = 256
"""Room for nf4's JSON of numbers, filled up with spaces; it takes about 180 bytes, and readers skip the spaces."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the variant: dtype as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def stored_tensors(module: str, shape: tuple[int, ...], recipe: Recipe) -> list[StoredTensor]:
    """Return what replaces `module`.weight of shape [rows, columns] in a variant made by `recipe`."""
    rows, columns = shape
    found: list[tuple[str, str, tuple[int, ...]]]
    match recipe.scheme:
        case "W4A16" | "W8A16":
            bits = 4 if recipe.scheme == "W4A16" else 8
            groups = columns // recipe.columns_divisor
            found = [
                ("weight_packed", "I32", (rows, columns * bits // 32)),
                ("weight_scale", "BF16", (rows, groups)),
                ("weight_shape", "I64", (2,)),
            ]
        case "W8A8":
            found = [("weight", "I8", shape), ("weight_scale", "BF16", (rows, 1))]
        case "FP8":
            found = [("weight", "F8_E4M3", shape), ("weight_scale", "BF16", (1,)), ("input_scale", "BF16", (1,))]
        case "FP8_DYNAMIC":
            found = [("weight", "F8_E4M3", shape), ("weight_scale", "BF16", (rows, 1))]
        case "FP8_BLOCK":
            found = [("weight", "F8_E4M3", shape), ("weight_scale", "BF16", (rows // 128, columns // 128))]
        case "NVFP4":
            found = [
                ("weight_packed", "U8", (rows, columns // 2)),
                ("weight_scale", "F8_E4M3", (rows, columns // 16)),
                ("weight_global_scale", "F32", (1,)),
                ("input_global_scale", "F32", (1,)),
            ]
        case "BNB_INT8":
            found = [("weight", "I8", shape), ("SCB", "F32", (rows,)), ("weight_format", "U8", ())]
        case "BNB_NF4":
            blocks = -(-rows * columns // NF4_BLOCK)
            found = [
                ("weight", "U8", (-(-rows * columns // 2), 1)),
                ("weight.absmax", "U8", (blocks,)),
                ("weight.quant_map", "F32", (16,)),
                ("weight.nested_absmax", "F32", (-(-blocks // NF4_NESTED_BLOCK),)),
                ("weight.nested_quant_map", "F32", (256,)),
                ("weight.quant_state.bitsandbytes__nf4", "U8", (NF4_STATE_BYTES,)),
            ]
    return [StoredTensor(f"{module}.{suffix}", dtype, size) for suffix, dtype, size in found]


@dataclass(frozen=True, slots=True)
class VariantTensors:
    """The tensors of a variant before it is made."""

    modules: list[str]
    """The linears that are quantized."""
    untouched: list[TensorInfo]
    """As they are in the base; norms that smoothing rewrites keep their size and are among them."""
    packed: list[StoredTensor]
    """What stands for the modules' weights."""

    @property
    def packed_bytes(self) -> int:
        """Bytes of what stands for the modules' weights."""
        return sum(tensor.size_bytes for tensor in self.packed)

    @property
    def untouched_bytes(self) -> int:
        """Bytes of all else."""
        return sum(tensor.size_bytes for tensor in self.untouched)


def variant_tensors(checkpoint: Checkpoint, recipe: Recipe, ignored: Collection[str]) -> VariantTensors:
    """Return the tensors of a variant of `checkpoint` by `recipe`, whose `ignored` linears stay in bf16."""
    modules = [
        name for layer in checkpoint_linears(checkpoint) for group in layer for name in group if name not in ignored
    ]
    kept = sorted(checkpoint.tensors.keys() - {f"{name}.weight" for name in modules})
    return VariantTensors(
        modules=modules,
        untouched=[checkpoint.tensors[name] for name in kept],
        packed=[
            t for name in modules for t in stored_tensors(name, checkpoint.tensors[f"{name}.weight"].shape, recipe)
        ],
    )


def stored_cache_scales(attention: str) -> list[StoredTensor]:
    """Return the scales of an FP8 cache that stand beside the attention module's linears."""
    return [StoredTensor(f"{attention}.{kind}_scale", "BF16", (1,)) for kind in "kv"]
