"""Smoothing: moving the magnitude of outlier channels from activations, where codes are few, into weights.

Where channel c of a linear's input is divided by s and column c of its weight multiplied by s, nothing changes in exact
arithmetic, and s = max|x|^a / max|w|^(1-a) evens out the channels that one activation scale has to serve (SmoothQuant,
arXiv 2211.10438; a is the strength). What divides the input is whatever makes it. For Gemma there are three places:

- input_layernorm before q/k/v and pre_feedforward_layernorm before gate/up: the gain, which is 1 + weight,
  in Gemma 4 the weight. (Its post_attention_layernorm stands after attention.) The bfloat16 weight is rounded first,
  and s is what the rounded gain really divides by, so the pair is exact whatever bfloat16 holds.
- up_proj before down_proj: the rows of up, whose output enters down's input as a factor. s is a power of two there,
  so that up's rows are divided exactly and, in channel-wise formats, keep their codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gemma_pack.gemma import NORM_BEFORE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from gemma_pack.quantization.input_statistics import InputStatistics

_SMALLEST = 1e-5
"""Below this a channel counts as silent (SmoothQuant's own clamp)."""


@dataclass(frozen=True, slots=True)
class Smoothed:
    """What smoothing makes of a group of linears that share an input."""

    columns: Tensor
    """float32 [columns]: what the input is divided by and the weights' columns are multiplied by."""
    norm: str | None = None
    """The tensor of the norm that makes the input."""
    norm_weight: Tensor | None = None
    """Its new weight, bfloat16 [columns]."""


def norm_of(group: Sequence[str]) -> str | None:
    """Return the norm tensor that makes the input of a group of linears; None where no norm does."""
    parent, _, module = group[0].rpartition(".")
    norm = NORM_BEFORE.get(module)
    return f"{parent.rpartition('.')[0]}.{norm}.weight" if norm else None


def smooth(
    group: Sequence[str],
    tensors: Mapping[str, Tensor],
    statistics: InputStatistics,
    strength: float,
    *,
    offset: int,
) -> Smoothed | None:
    """Return how to smooth a group; None where nothing that could be scaled makes its input.

    Args:
        group: module names of linears that share an input.
        tensors: the layer's bfloat16 tensors by name.
        statistics: of the input.
        strength: 0 leaves the activations as they are, 1 makes their channels equal.
        offset: what is added to a norm's weight to make its gain (`gemma.norm_offset`).
    """
    norm = norm_of(group)
    if norm is None and feeder_of(group) is None:
        return None
    largest = torch.stack([tensors[f"{name}.weight"].float().abs().amax(0) for name in group]).amax(0)
    wanted = statistics.largest.clamp_min(_SMALLEST) ** strength / largest.clamp_min(_SMALLEST) ** (1 - strength)
    wanted = wanted / wanted.log().mean().exp()
    if norm is None:
        return Smoothed(torch.exp2(wanted.log2().round()))
    gain = offset + tensors[norm].float()
    stored = (gain / wanted - offset).to(torch.bfloat16)
    factors = gain / (offset + stored.float())
    usable = torch.isfinite(factors) & (factors > 0)  # not where the gain is zero, or bfloat16 rounds it to zero
    return Smoothed(
        torch.where(usable, factors, torch.ones_like(factors)), norm, torch.where(usable, stored, tensors[norm])
    )


def feeder_of(group: Sequence[str]) -> str | None:
    """Return the linear whose rows make the channels of a group's input: up_proj for down_proj, else None."""
    return group[0].replace("down_proj", "up_proj") if group[0].endswith("down_proj") else None


def smoothed_weights(
    group: Sequence[str],
    tensors: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
    smoothed: Sequence[Smoothed | None],
) -> list[Tensor]:
    """Return the float32 weights of a group of linears, columns multiplied and rows divided as the layer's plan says.

    Args:
        group: the linears, one of `groups`.
        tensors: the layer's bfloat16 tensors by name.
        groups: all groups of the layer.
        smoothed: the plan, one for each of `groups`; all None where nothing is smoothed.
    """
    weights = [tensors[f"{name}.weight"].float() for name in group]
    for other, change in zip(groups, smoothed, strict=True):
        if change is not None:
            columns = change.columns.to(weights[0].device)
            if other == group:
                weights = [weight * columns for weight in weights]
            elif (feeder := feeder_of(other)) in group:
                at = list(group).index(str(feeder))
                weights[at] = weights[at] / columns[:, None]
    return weights
