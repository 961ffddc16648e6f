"""Rounding the weights of linear layers that share an input: to nearest, or by GPTQ.

GPTQ (arXiv 2210.17323) rounds a weight matrix column by column and spreads each column's error over the columns
that are still to come, weighted by the inverse Hessian H = 2 X Xᵀ of the inputs. H depends on the input
alone, so layers that share an input (q/k/v; gate/up) share one H and one factorization: their rows are stacked and
rounded as one matrix. On a GPU the kernel is llm-compressor's in Triton, elsewhere the one of `gptq`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from compressed_tensors.quantization import QuantizationStrategy, QuantizationType, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

from gemma_pack.errors import QuantizationError
from gemma_pack.quantization.gptq import gptq
from gemma_pack.quantization.packing import RoundedLinear
from gemma_pack.quantization.scales import choose_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

    from gemma_pack.quantization.ranks import Ranks
    from gemma_pack.recipe import Gptq, Recipe


@contextmanager
def _matrix_unit() -> Iterator[None]:
    """Let float32 products whose factors are bfloat16 values use the matrix unit, for these products alone.

    Left on, it would round factors that are no bfloat16 values too: Gemma's rotary embedding is a float32 product of
    positions and frequencies, and with rounded positions the perplexity of Gemma 3 270M rises from 15.4 to 17.9.
    """
    matmuls = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [matmul.fp32_precision for matmul in matmuls]
    try:
        for matmul, precision in zip(matmuls, ("bf16", "tf32"), strict=True):
            matmul.fp32_precision = precision
        yield
    finally:
        for matmul, precision in zip(matmuls, before, strict=True):
            matmul.fp32_precision = precision


class InputStatistics:
    """What calibration learns about the inputs of a group of linears: 2 X Xᵀ / tokens, and the largest magnitudes.

    Activations are bfloat16, whose products are exact in float32; the matrix unit may therefore take them as
    bfloat16 (AMX on a CPU) or TF32 (on a GPU) and only has to add in float32.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        """Start from nothing; `columns` is the width of the input."""
        self.total = torch.zeros((columns, columns), dtype=torch.float32, device=device)
        self.largest = torch.zeros(columns, dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add bfloat16 inputs [..., columns]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        exact = rows.float()
        with _matrix_unit():
            self.total.addmm_(exact.T, exact)
        self.largest = torch.maximum(self.largest, torch.maximum(rows.amax(0), -rows.amin(0)).float())
        self.tokens += rows.shape[0]

    def merge(self, ranks: Ranks) -> None:
        """Take in what the other processes have seen."""
        ranks.add(self.total)
        ranks.add(self.tokens)
        ranks.maximum(self.largest)

    def divided(self, factors: Tensor) -> InputStatistics:
        """Return the statistics of the same inputs divided by float32 [columns]."""
        smaller = InputStatistics(len(factors), self.total.device)
        smaller.total = self.total / factors / factors[:, None]
        smaller.largest = self.largest / factors.abs()
        smaller.tokens = self.tokens
        return smaller

    def hessian(self) -> Tensor:
        """Return 2 X Xᵀ / tokens, float32 [columns, columns].

        Raises:
            QuantizationError: an input was not finite.
        """
        mean = self.total * (2.0 / self.tokens.clamp_min(1))
        if not torch.isfinite(mean).all():
            raise QuantizationError(
                "the calibration activations are not finite",
                hint="check the checkpoint: validate it against its source",
            )
        return mean

    def scale(self, arguments: QuantizationArgs) -> Tensor:
        """Return the static scale [1] of these inputs: bfloat16 per tensor, or NVFP4's float32 global scale."""
        span = self.largest.max().reshape(1)
        if arguments.strategy == QuantizationStrategy.TENSOR_GROUP:
            global_scale: Tensor = generate_gparam(-span, span)
            return global_scale.float()
        scale: Tensor = calculate_qparams(-span, span, arguments)[0]
        return scale.to(torch.bfloat16)


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
    if arguments.strategy == QuantizationStrategy.TENSOR:  # one scale a tensor: rows cannot be stacked with others
        return [_round(weight.float(), arguments, statistics, recipe) for weight in weights]
    rows = [weight.shape[0] for weight in weights]
    block = arguments.block_structure[0] if arguments.strategy == QuantizationStrategy.BLOCK else 1
    if any(count % block for count in rows):
        raise QuantizationError(
            f"a layer has a number of rows that blocks of {block} do not divide", hint="use another recipe"
        )
    whole = _round(torch.cat(weights).float(), arguments, statistics, recipe)
    parts = torch.split(whole.weight, rows)
    scales = torch.split(whole.scale, [count // block for count in rows])
    return [RoundedLinear(part, scale, whole.global_scale) for part, scale in zip(parts, scales, strict=True)]


def _round(
    weight: Tensor, arguments: QuantizationArgs, statistics: InputStatistics | None, recipe: Recipe
) -> RoundedLinear:
    """Choose the scales of float32 [rows, columns] and round it to their grid."""
    scale, global_scale = choose_scale(weight, arguments, recipe.observer)
    if statistics is None or recipe.algorithm == "nearest":
        nearest = fake_quantize(weight, scale, None, arguments, global_scale=global_scale)
        return RoundedLinear(nearest.float(), scale, global_scale)
    if weight.is_cuda:
        rounded = _gptq_by_triton(
            weight, scale, global_scale, hessian=statistics.hessian(), arguments=arguments, settings=recipe.gptq
        )
    else:
        exact = scale.float() if global_scale is None else scale.float() / global_scale
        rounded = gptq(
            weight,
            _expanded(exact, weight, arguments),
            statistics.hessian(),
            _codes(arguments),
            dampening=recipe.gptq.dampening,
            block=recipe.gptq.block_size,
        )
    return RoundedLinear(rounded, scale, global_scale)


def _expanded(scale: Tensor, weight: Tensor, arguments: QuantizationArgs) -> Tensor:
    """Return the scale of each weight: scales as the strategy shapes them, expanded to [rows, columns]."""
    rows, columns = weight.shape
    if arguments.strategy == QuantizationStrategy.BLOCK:
        high, wide = arguments.block_structure
        return scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    if arguments.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP):
        return scale.repeat_interleave(arguments.group_size, 1)
    return scale.expand(rows, columns)


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


def _gptq_by_triton(
    weight: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    *,
    hessian: Tensor,
    arguments: QuantizationArgs,
    settings: Gptq,
) -> Tensor:
    """Return float32 [rows, columns] on the grid of `scale`, by llm-compressor's kernel."""
    rounded, _, fell_back = quantize_weight(
        weights=weight.clone()[None],
        hessians=hessian[None],
        scale=scale[None],
        zero_point=torch.zeros_like(scale, dtype=arguments.zp_dtype)[None],
        global_scale=None if global_scale is None else global_scale.reshape(1),
        quant_args=arguments,
        blocksize=settings.block_size,
        percdamp=settings.dampening,
    )
    if bool(fell_back.any()):
        raise QuantizationError(
            "the Hessian of a layer's inputs is not positive definite",
            hint="calibrate with more or more varied text, or raise gptq.dampening in the recipe",
        )
    result: Tensor = rounded[0]
    return result
