"""The files of a variant before it is made: which tensors stand for each linear layer, in which shards, in what sizes.

Sizes of shards are exact; the small files that only the run writes are guessed to a few kilobytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma_pack.checkpoint import INDEX_NAME, RECORD_NAME
from gemma_pack.quantization.fitting import ignored_modules, require_divisible
from gemma_pack.quantization.layout import variant_tensors
from gemma_pack.quantization.shards import divide, shard_name
from gemma_pack.safetensors_file import DTYPE_BITS, TensorInfo, plan_safetensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.quantization.layout import StoredTensor
    from gemma_pack.recipe import Recipe

RECIPE_BYTES: Final = 4_096
CARD_BYTES: Final = 12_000
QUANTIZATION_CONFIG_BYTES: Final = 1_500
"""Files that only the run writes; a few kilobytes, so a guess is near enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the variant's files will hold: bytes of tensors, and the files by name."""

    base_bytes: int
    quantized_bytes: int
    untouched_bytes: int
    quantized_weights: int
    """Number of weights that are rounded."""
    files: Mapping[str, int]
    changed: frozenset[str]

    @property
    def variant_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.quantized_bytes + self.untouched_bytes

    @property
    def bits_a_weight(self) -> float:
        """Of the rounded weights, with their scales."""
        return 8 * self.quantized_bytes / self.quantized_weights


def plan_sizes(checkpoint: Checkpoint, recipe: Recipe, companions: Mapping[str, int]) -> Sizes:
    """Return the sizes of a variant of `checkpoint` by `recipe`.

    Raises:
        RecipeError: the recipe does not fit this model.
        CheckpointError: a tensor that config.json promises is missing.
    """
    ignored = ignored_modules(checkpoint, recipe)
    require_divisible(checkpoint, recipe, ignored)
    tensors = variant_tensors(checkpoint, recipe, ignored)
    files = {**_shards("untouched", tensors.untouched), **_shards("quantized", tensors.packed)}
    names = [*(tensor.name for tensor in tensors.untouched), *(tensor.name for tensor in tensors.packed)]
    config = len(json.dumps(checkpoint.config, indent=2)) + QUANTIZATION_CONFIG_BYTES
    files |= {name: size for name, size in companions.items() if name != "README.md"}
    files |= {
        "config.json": config,
        INDEX_NAME: sum(len(name) + 48 for name in names),
        RECORD_NAME: sum(len(name) + 20 for name in tensors.modules) + RECIPE_BYTES,
        "recipe.yaml": RECIPE_BYTES,
        "README.md": CARD_BYTES,
    }
    return Sizes(
        base_bytes=checkpoint.size_bytes,
        quantized_bytes=tensors.packed_bytes,
        untouched_bytes=tensors.untouched_bytes,
        quantized_weights=sum(checkpoint.tensors[f"{name}.weight"].parameters for name in tensors.modules),
        files=files,
        changed=frozenset(f"{name}.weight" for name in tensors.modules),
    )


def _shards(kind: str, tensors: Sequence[TensorInfo | StoredTensor]) -> dict[str, int]:
    """Return the files, with their size, that hold the tensors: header and data."""
    files = {}
    for number, shard in enumerate(divide(tensors), start=1):
        name = shard_name(kind, number)
        if kind == "quantized":  # the order in which the shards grow; it decides how many digits the offsets have
            shard.sort(key=lambda tensor: (-DTYPE_BITS[tensor.dtype], tensor.name))
        header, _ = plan_safetensors(Path(name), [(t.name, t.dtype, t.shape) for t in shard])
        files[name] = len(header) + sum(tensor.size_bytes for tensor in shard)
    return files
