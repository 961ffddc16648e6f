"""Rounding the weights of linear layers that share an input: to nearest, or by GPTQ.

GPTQ (arXiv 2210.17323) rounds a weight matrix column by column and spreads each column's error over the columns
that are still to come, weighted by the inverse Hessian H = 2 X Xᵀ of the inputs. H depends on the input
alone, so layers that share an input (q/k/v; gate/up) share one H and one factorization: their rows are stacked and
rounded as one matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from compressed_tensors.quantization import QuantizationStrategy, QuantizationType, fake_quantize

from gemma_pack.errors import QuantizationError
from gemma_pack.quantization.gptq import factorize, gptq
from gemma_pack.quantization.packing import RoundedLinear
from gemma_pack.quantization.scales import choose_scale

if TYPE_CHECKING:
    from collections.abc import Callable

    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

    from gemma_pack.quantization.input_statistics import InputStatistics
    from gemma_pack.recipe import Recipe


def round_group(
    weights: list[Tensor], arguments: QuantizationArgs, statistics: InputStatistics | None, recipe: Recipe
) -> list[RoundedLinear]:
    """Round linear layers that share an input.

    Args:
        weights: [rows_i, columns] each.
        arguments: compressed-tensors' arguments, symmetric.
        statistics: of their input; None where no text was read.
        recipe: names the algorithm and its settings.

    Raises:
        QuantizationError: the inputs are not finite, or the Hessian cannot be factorized.
    """
    rows = [weight.shape[0] for weight in weights]
    block = arguments.block_structure[0] if arguments.strategy == QuantizationStrategy.BLOCK else 1
    if any(count % block for count in rows):
        raise QuantizationError(
            f"a layer has a number of rows that blocks of {block} do not divide", hint="use another recipe"
        )
    whole = _round(torch.cat(weights).float(), arguments, statistics, recipe)
    parts = torch.split(whole.weight, rows)
    if arguments.strategy == QuantizationStrategy.TENSOR:
        # One for all: servers fuse these layers and, where their scales differ, round all but one layer's weights
        # anew by the largest (vLLM's `requantize_with_max_scale`), which undoes what GPTQ chose.
        scales: tuple[Tensor, ...] = (whole.scale,) * len(rows)
    else:
        scales = torch.split(whole.scale, [count // block for count in rows])
    return [RoundedLinear(part, scale, whole.global_scale) for part, scale in zip(parts, scales, strict=True)]


def _round(
    weight: Tensor, arguments: QuantizationArgs, statistics: InputStatistics | None, recipe: Recipe
) -> RoundedLinear:
    """Choose the scales of float32 [rows, columns] and round it to their grid."""
    if statistics is None or recipe.algorithm == "nearest":
        scale, global_scale = choose_scale(weight, arguments, recipe.observer)
        nearest = fake_quantize(weight, scale, None, arguments, global_scale=global_scale)
        return RoundedLinear(nearest.float(), scale, global_scale)
    settings = recipe.gptq
    factor = factorize(statistics.hessian(settings.sink_share), settings.dampening)
    scale, global_scale = choose_scale(weight, arguments, recipe.observer, factor.column_costs())
    exact = scale.float() if global_scale is None else scale.float() / global_scale
    scale_of_rows, groups = _in_groups(exact, weight, arguments)
    rounded = gptq(weight, scale_of_rows, groups, factor, _codes(arguments), block=settings.block_size)
    return RoundedLinear(rounded, scale, global_scale)


def _in_groups(scale: Tensor, weight: Tensor, arguments: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Return scales [rows, groups] from scales as the strategy shapes them, and the group of each column."""
    rows, columns = weight.shape
    numbers = torch.arange(columns, device=weight.device)
    if arguments.strategy == QuantizationStrategy.BLOCK:
        high, wide = arguments.block_structure
        return scale.repeat_interleave(high, 0)[:rows], numbers // wide
    if arguments.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP):
        return scale, numbers // arguments.group_size
    return scale.expand(rows, 1), torch.zeros_like(numbers)


def _codes(arguments: QuantizationArgs) -> Callable[[Tensor], Tensor]:
    """Return the function that rounds scaled weights to what the format holds."""
    if arguments.type == QuantizationType.INT:
        half = 1 << (arguments.num_bits - 1)
        return lambda scaled: scaled.round_().clamp_(-half, half - 1)
    if arguments.num_bits == 8:
        largest = torch.finfo(torch.float8_e4m3fn).max
        return lambda scaled: scaled.clamp_(-largest, largest).to(torch.float8_e4m3fn).float()
    return _nearest_fp4


def _nearest_fp4(scaled: Tensor) -> Tensor:
    """Round to the nearest number of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3)."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=scaled.device)
    return levels[torch.bucketize(scaled.abs(), (levels[1:] + levels[:-1]) / 2)].copysign(scaled)
