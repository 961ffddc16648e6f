"""What smoothing multiplied a layer's columns and divided its rows by, read from the two checkpoints.

Smoothing divides a layer's input and multiplies the columns that meet it (SmoothQuant, arXiv 2211.10438). Where a norm
makes the input, its gain (1 + w, in Gemma 4 w) says by how much: base over variant. Where up_proj's rows feed
down_proj's columns, the factors are powers of two, and the columns' own norms say which. Up is held to what down's
columns say, so that a pair that no longer cancels out shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_pack.gemma import FUSED_GROUPS, NORM_BEFORE, norm_offset

if TYPE_CHECKING:
    from torch import Tensor

    from gemma_pack.evaluation.quantized_weights import OpenedCheckpoint, QuantizedWeights

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Factors:
    """What a layer's weight was multiplied by: float32 [columns] and [rows]."""

    columns: Tensor
    rows: Tensor


def smoothing_factors(
    layer: str, source: OpenedCheckpoint, variant: OpenedCheckpoint, weights: QuantizedWeights
) -> Factors:
    """Return the factors of one linear layer; ones where nothing was smoothed."""
    import torch

    rows, columns = source.checkpoint.tensors[f"{layer}.weight"].shape
    parent, _, module = layer.rpartition(".")
    first = next(group[0] for group in FUSED_GROUPS if module in group)
    by_column, by_row = torch.ones(columns), torch.ones(rows)
    if norm := NORM_BEFORE.get(first):
        name = f"{parent.rpartition('.')[0]}.{norm}.weight"
        offset = norm_offset(source.checkpoint.config)
        gains = [offset + opened.rows(name).float() for opened in (source, variant)]
        by_column = (gains[0] / gains[1]).nan_to_num(nan=1.0, posinf=1.0)  # a gain of zero was left alone
    if module == "down_proj":
        by_column = _powers(layer, source, weights)
    if module == "up_proj":
        by_row = 1 / _powers(f"{parent}.down_proj", source, weights)
    return Factors(by_column, by_row)


def _powers(layer: str, source: OpenedCheckpoint, weights: QuantizedWeights) -> Tensor:
    """Return the power of two nearest to how much each column grew, float32 [columns]."""
    import torch

    rows, columns = source.checkpoint.tensors[f"{layer}.weight"].shape
    step = -(-_ROWS_AT_ONCE // weights.block_rows) * weights.block_rows
    before, after = torch.zeros(columns), torch.zeros(columns)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        before += source.rows(f"{layer}.weight", begin, end).float().square().sum(0)
        after += weights.rows(layer, begin, end, "cpu").square().sum(0)
    grown = ((after / before).log2() / 2).round()
    return torch.exp2(grown.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))  # silent columns say nothing
