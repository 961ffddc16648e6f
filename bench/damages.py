"""Damage that a variant can be made to have, for the tests and for bench/damage.py: what a validation must catch.

Each changes the tensors of a quantized checkpoint, given by name, in place.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Tensors = dict[str, Tensor]


def damaged_copy(variant: Path, target: Path, damage: Callable[[Tensors], None]) -> Path:
    """Copy the variant to `target`, with `damage` done to its tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(variant, target)
    files = sorted(target.glob("*.safetensors"))
    names = {path: set(load_file(path)) for path in files}
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    damage(tensors)
    for path in files:
        path.unlink()  # it may share its bytes with another variant
        kept = {name: tensors[name].contiguous() for name in names[path]}
        save_file(kept, path, metadata={"format": "pt"})
    return target


def rescale(tensors: Tensors, layer: str, factor: float) -> None:
    """Take a linear layer's scales times `factor`."""
    scale = tensors[f"{layer}.weight_scale"]
    tensors[f"{layer}.weight_scale"] = (scale.float() * factor).to(scale.dtype)


def swap_heads(tensors: Tensors, layer: str, head_dim: int) -> None:
    """Exchange the first two heads of a query projection, weights and scales."""
    import torch

    for key in ("weight", "weight_packed", "weight_scale"):
        rows = tensors.get(f"{layer}.{key}")
        if rows is not None and rows.ndim == 2 and len(rows) >= 2 * head_dim:
            first, second, rest = rows[:head_dim], rows[head_dim : 2 * head_dim], rows[2 * head_dim :]
            tensors[f"{layer}.{key}"] = torch.cat([second, first, rest])


def exchange(tensors: Tensors, layer: str, other: str) -> None:
    """Exchange two linear layers of one shape."""
    for name in [name for name in tensors if name.startswith(f"{layer}.")]:
        key = name.removeprefix(layer)
        tensors[name], tensors[f"{other}{key}"] = tensors[f"{other}{key}"], tensors[name]


def shift_groups(tensors: Tensors, prefix: str) -> None:
    """Give each group of every linear layer below `prefix` the scale of the group before it."""
    for name in _scales(tensors, prefix):
        scale = tensors[name]
        axis = 1 if scale.shape[-1] > 1 else 0
        tensors[name] = scale.float().roll(1, axis).to(scale.dtype)


def disturb_scales(tensors: Tensors, prefix: str, share: float, *, seed: int = 0) -> None:
    """Take each scale of every linear layer below `prefix` times 1 + `share` · N(0, 1)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name in _scales(tensors, prefix):
        scale = tensors[name]
        tensors[name] = (scale.float() * (1 + share * torch.randn(scale.shape, generator=generator))).to(scale.dtype)


def round_norms(tensors: Tensors) -> None:
    """Store 1 + w of each norm in bfloat16 and subtract 1 again, as upstream's smoothing does on every run."""
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        tensors[name] = (1 + tensors[name]) - 1


def _scales(tensors: Tensors, prefix: str) -> list[str]:
    return sorted(name for name in tensors if name.startswith(prefix) and name.endswith(".weight_scale"))
