"""Rounding the weights of linear layers that share an input: to nearest, or by GPTQ.

GPTQ (arXiv 2210.17323) rounds a weight matrix column by column and spreads each column's error over the columns
that are still to come, weighted by the inverse Hessian H = 2 X Xᵀ of the inputs. H depends on the input
alone, so layers that share an input (q/k/v; gate/up) share one H and one factorization: their rows are stacked and
rounded as one matrix. The block kernel, the factorization and the choice of scales are llm-compressor's.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from compressed_tensors.quantization import QuantizationStrategy, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer

from gemma_pack.errors import QuantizationError
from gemma_pack.quantization.packing import RoundedLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

    from gemma_pack.recipe import Recipe

_WHOLE_GRID = 1_000_000


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
    """What calibration learns about the inputs of a group of linears: 2 X Xᵀ / tokens, and the largest magnitude.

    Activations are bfloat16, whose products are exact in float32; the matrix unit may therefore take them as
    bfloat16 (AMX on a CPU) or TF32 (on a GPU) and only has to add in float32.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        """Start from nothing; `columns` is the width of the input."""
        self.total = torch.zeros((columns, columns), dtype=torch.float32, device=device)
        self.largest = torch.zeros((), dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add bfloat16 inputs [..., columns]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        with _matrix_unit():
            self.total.addmm_(rows.T, rows)
        self.largest = torch.maximum(self.largest, rows.abs().max())
        self.tokens += rows.shape[0]

    def hessian(self) -> Tensor:
        """Return 2 X Xᵀ / tokens, float32 [columns, columns].

        Raises:
            QuantizationError: an input was not finite.
        """
        mean = self.total * (2.0 / max(self.tokens, 1))
        if not torch.isfinite(mean).all():
            raise QuantizationError(
                "the calibration activations are not finite",
                hint="check the checkpoint: validate it against its source",
            )
        return mean

    def scale(self, arguments: QuantizationArgs) -> Tensor:
        """Return the static scale [1] of these inputs: bfloat16 per tensor, or NVFP4's float32 global scale."""
        span = self.largest.reshape(1)
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
        weights: bfloat16 [rows_i, columns] each.
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
    scale, global_scale = _choose_scale(weight, arguments)
    if statistics is None or recipe.algorithm == "nearest":
        nearest = fake_quantize(weight, scale, None, arguments, global_scale=global_scale)
        return RoundedLinear(nearest.float(), scale, global_scale)
    rounded, _, fell_back = quantize_weight(
        weights=weight.clone()[None],
        hessians=statistics.hessian()[None],
        scale=scale[None],
        zero_point=torch.zeros_like(scale, dtype=arguments.zp_dtype)[None],
        global_scale=None if global_scale is None else global_scale.reshape(1),
        quant_args=arguments,
        blocksize=recipe.gptq.block_size,
        percdamp=recipe.gptq.dampening,
    )
    if bool(fell_back.any()):
        raise QuantizationError(
            "the Hessian of a layer's inputs is not positive definite",
            hint="calibrate with more or more varied text, or raise gptq.dampening in the recipe",
        )
    return RoundedLinear(rounded[0], scale, global_scale)


def _choose_scale(weight: Tensor, arguments: QuantizationArgs) -> tuple[Tensor, Tensor | None]:
    """Return the scales of float32 weights by the recipe's observer, rounded to the dtype they are stored in.

    For NVFP4 also its global scale, float32 [1]. Rounding comes first: weights are rounded by what is stored.
    """
    # Upstream's grid search gives up when no group of the whole matrix has improved for a few steps, so that a
    # group's scale would depend on its neighbours; with this patience the whole grid is searched for each.
    own = arguments.model_copy(update={"observer_kwargs": {"patience": _WHOLE_GRID}})
    observer = Observer.load_from_registry(arguments.observer, base_name="weight", args=own)
    observer(weight)
    found = observer.get_qparams()
    if arguments.strategy == QuantizationStrategy.TENSOR_GROUP:
        return found["scale"], found["global_scale"]
    return found["scale"].to(torch.bfloat16), None
