"""How much memory quantizing takes, from headers and the recipe alone.

Each path holds what it holds whatever the weights are, so its peak follows from shapes: the sum of what lies in memory
at the same time, phase by phase, and the largest phase counts. It is an upper estimate: torch may free earlier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gemma_pack.gemma import (
    attention_implementation,
    checkpoint_linears,
    decoder_number,
    is_embedding_or_head,
    layer_types,
)

if TYPE_CHECKING:
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.recipe import Calibration, Recipe

LIBRARIES_BYTES: Final = 500_000_000
"""Python, torch and compressed-tensors with what it imports: 0.60 GB at the peak with the pieces (measured)."""
MODEL_LIBRARIES_BYTES: Final = 900_000_000
"""With transformers and llm-compressor, 0.55 GB after the imports (measured), and what their first calls add."""
TOKENS_A_BATCH: Final = 4096
"""In one forward call of the calibrated path."""
TOKENS_A_PRODUCT: Final = 256
"""Rows of logits made by one product with the head: enough to use the matrix unit well."""
_PIECES_BYTES: Final = 200_000_000
"""Pieces of weights under way in the threads of the data-free path."""
_BF16: Final = 2
_FLOAT32: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peak memory in bytes: of the process, and of a GPU where one computes."""

    host_bytes: int
    device_bytes: int
    streamed: Memory | None = None
    """What it is on a GPU too small for that, where refinement can keep the layers' weights in host memory."""

    @property
    def without_gpu_bytes(self) -> int:
        """Of the process where the CPU does all."""
        return self.host_bytes + self.device_bytes


def peak_memory(checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration | None) -> Memory:
    """Return the peak of making a variant of `checkpoint` by `recipe`, with its text or the one said instead."""
    if calibration is None:
        return Memory(host_bytes=LIBRARIES_BYTES + _PIECES_BYTES, device_bytes=0)
    hidden = decoder_number(checkpoint.config, "hidden_size")
    states = calibration.samples * calibration.sequence_length * hidden * _BF16
    layerwise = Memory(
        host_bytes=MODEL_LIBRARIES_BYTES + states,
        device_bytes=_layerwise_bytes(checkpoint, recipe, calibration.sequence_length),
    )
    if recipe.refinement is None:
        return layerwise
    kept = MODEL_LIBRARIES_BYTES + recipe.refinement.windows * recipe.refinement.sequence_length * hidden * _BF16
    resident = Memory(host_bytes=kept, device_bytes=refinement_bytes(checkpoint, recipe))
    streamed = Memory(
        host_bytes=max(layerwise.host_bytes, kept + checkpoint.size_bytes),
        device_bytes=max(layerwise.device_bytes, _streamed_refinement_bytes(checkpoint, recipe)),
    )
    larger = max(layerwise, resident, key=lambda memory: memory.without_gpu_bytes)
    return Memory(
        host_bytes=larger.host_bytes,
        device_bytes=larger.device_bytes,
        streamed=streamed if streamed.device_bytes < larger.device_bytes else None,
    )


def refinement_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Return what tuning the scales of the whole model takes where it computes.

    Model and codes at once, the optimizer, activations kept for the gradient, and a few rows of logits.
    """
    shapes = _linears(checkpoint)
    codes = sum(rows * columns for rows, columns in shapes)
    activations = _tokens_a_step(recipe) * sum(rows for rows, _ in shapes) * 3 * _BF16
    return checkpoint.size_bytes + codes + _optimizer_bytes(shapes, recipe) + activations + _logits_bytes(checkpoint)


def _streamed_refinement_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Return what it takes where layers come from host memory when they compute, and go again.

    All that is not a layer's weight matrix, the optimizer, the layers' inputs, one layer whole with its activations,
    the product of the largest matrix with its gradient, and a few rows of logits.
    """
    shapes = _linears(checkpoint)
    tokens = _tokens_a_step(recipe)
    others = checkpoint.size_bytes - sum(rows * columns for rows, columns in shapes) * _BF16
    inputs = tokens * decoder_number(checkpoint.config, "hidden_size") * len(checkpoint_linears(checkpoint)) * _BF16
    layer = max(
        _weights_bytes(checkpoint, layer) + tokens * sum(_shape(checkpoint, n)[0] for g in layer for n in g) * 3 * _BF16
        for layer in checkpoint_linears(checkpoint)
    )
    gradient = 3 * max(rows * columns for rows, columns in shapes) * _BF16
    return others + _optimizer_bytes(shapes, recipe) + inputs + layer + gradient + _logits_bytes(checkpoint)


def _layerwise_bytes(checkpoint: Checkpoint, recipe: Recipe, sequence_length: int) -> int:
    """Embedding, a layer of each kind, and what the largest layer takes."""
    layers = checkpoint_linears(checkpoint)
    kinds = len(set(layer_types(checkpoint.config)))
    weights = kinds * max(_weights_bytes(checkpoint, layer) for layer in layers)
    work = max(_layer_work_bytes(checkpoint, recipe, layer, sequence_length) for layer in layers)
    return _embedding_bytes(checkpoint) + weights + work


def _weights_bytes(checkpoint: Checkpoint, layer: list[list[str]]) -> int:
    return sum(math.prod(_shape(checkpoint, name)) for group in layer for name in group) * _BF16


def _layer_work_bytes(checkpoint: Checkpoint, recipe: Recipe, layer: list[list[str]], sequence_length: int) -> int:
    """The statistics of a layer's inputs, one batch, and rounding the widest group."""
    shapes = [[_shape(checkpoint, name) for name in group] for group in layer]
    stacked = [(sum(rows for rows, _ in group), group[0][1]) for group in shapes]
    hessians = sum(columns**2 for _, columns in stacked) * _FLOAT32
    squares = 1 if recipe.smoothing is None else 2  # the Hessian, then its factor; statistics of the smoothed inputs
    matrices = 12 if recipe.scheme == "NVFP4" else 6  # the weights among them; upstream's search for FP4's scales
    rounding = max(matrices * rows * columns + squares * columns**2 for rows, columns in stacked) * _FLOAT32
    forward = TOKENS_A_BATCH * sum(rows for rows, _ in stacked) * 2 * _BF16
    if attention_implementation(checkpoint.config) == "eager":  # holds the scores, in float32 for the softmax
        windows = max(1, TOKENS_A_BATCH // sequence_length)
        heads = decoder_number(checkpoint.config, "num_attention_heads")
        forward += 2 * windows * heads * sequence_length**2 * _FLOAT32
    return hessians + max(rounding, forward)


def _linears(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    return [_shape(checkpoint, name) for layer in checkpoint_linears(checkpoint) for group in layer for name in group]


def _tokens_a_step(recipe: Recipe) -> int:
    return recipe.refinement.windows_a_step * recipe.refinement.sequence_length if recipe.refinement else 0


def _optimizer_bytes(shapes: list[tuple[int, int]], recipe: Recipe) -> int:
    """In float32: the scales as they were, their change, its gradient, and Adam's two moments."""
    groups = sum(rows * math.ceil(columns / recipe.columns_divisor) for rows, columns in shapes)
    return 5 * groups * _FLOAT32


def _logits_bytes(checkpoint: Checkpoint) -> int:
    """Of the model and the base, and one more copy."""
    vocabulary = _embedding_bytes(checkpoint) // _BF16 // decoder_number(checkpoint.config, "hidden_size")
    return 3 * TOKENS_A_PRODUCT * vocabulary * _BF16


def _embedding_bytes(checkpoint: Checkpoint) -> int:
    return max((info.size_bytes for name, info in checkpoint.tensors.items() if is_embedding_or_head(name)), default=0)


def _shape(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    rows, columns = checkpoint.tensors[f"{module}.weight"].shape
    return rows, columns
