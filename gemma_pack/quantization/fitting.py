"""Whether a recipe fits a model: which layers it leaves alone, and whether its groups divide the others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gemma_pack.errors import CheckpointError, RecipeError
from gemma_pack.gemma import checkpoint_linears

if TYPE_CHECKING:
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.recipe import Recipe


def ignored_modules(checkpoint: Checkpoint, recipe: Recipe) -> set[str]:
    """Return the decoder linears that the recipe's `ignore` names.

    Raises:
        RecipeError: an entry matches nothing, or splits layers that a server fuses into one matrix.
    """
    groups = linear_groups(checkpoint)
    names = [name for group in groups for name in group]
    ignored: set[str] = set()
    for entry in recipe.ignore:
        pattern = entry.removeprefix("re:") if entry.startswith("re:") else re.escape(entry)
        found = {name for name in names if re.fullmatch(pattern, name)}
        if not found:
            raise RecipeError(
                f"ignore: {entry} of recipe {recipe.name} matches no linear layer of this model",
                hint=f"layer names look like {names[0]}; embeddings and head are left alone anyway",
            )
        ignored |= found
    for group in groups:
        if ignored.intersection(group) and not ignored.issuperset(group):
            raise RecipeError(
                f"recipe {recipe.name} ignores a part of {', '.join(group)}, which servers fuse into one matrix",
                hint="ignore all of them or none",
            )
    return ignored


def require_divisible(checkpoint: Checkpoint, recipe: Recipe, ignored: set[str]) -> None:
    """Raise unless the groups divide the input columns of every layer to be quantized."""
    size = recipe.columns_divisor
    for name in (name for group in linear_groups(checkpoint) for name in group if name not in ignored):
        info = checkpoint.tensors.get(f"{name}.weight")
        if info is None:
            raise CheckpointError(
                f"{checkpoint.directory} has no tensor {name}.weight, which config.json promises",
                hint="fetch the checkpoint again",
            )
        if info.shape[1] % size:
            raise RecipeError(
                f"{name} has {info.shape[1]} input columns, which groups of {size} do not divide",
                hint="use a recipe with smaller groups",
            )
        if recipe.scheme == "FP8_BLOCK" and info.shape[0] % size:
            raise RecipeError(
                f"{name} has {info.shape[0]} rows, which blocks of {size} do not divide", hint="use fp8-dynamic"
            )


def linear_groups(checkpoint: Checkpoint) -> list[list[str]]:
    """Return the names of the decoder's linears, those together that a server fuses into one matrix."""
    return [group for layer in checkpoint_linears(checkpoint) for group in layer]
