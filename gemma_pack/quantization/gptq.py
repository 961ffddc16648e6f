"""GPTQ for a group of linear layers that share an input.

GPTQ (arXiv 2210.17323) rounds a weight matrix column by column and spreads each column's error over the columns
that are still to come, weighted by the inverse Hessian H = 2 X Xᵀ of the inputs. H depends on the input
alone, so layers that share an input (q/k/v; gate/up) share one H and one factorization: their rows are stacked and
quantized as one matrix. The block kernel, the factorization and the choice of scales are llm-compressor's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer

from gemma_pack.errors import QuantizationError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

    from gemma_pack.recipe import Gptq


_WHOLE_GRID = 1_000_000


class Hessian:
    """The running sum of 2 X Xᵀ / tokens over all inputs seen.

    Activations are bfloat16, whose products are exact in float32; the matrix unit may therefore take them as
    bfloat16 (AMX on a CPU) or TF32 (on a GPU) and only has to add in float32.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        """Start from zero; `columns` is the width of the input."""
        self.total = torch.zeros((columns, columns), dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add bfloat16 inputs [..., columns]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.total.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    def mean(self) -> Tensor:
        """Return 2 X Xᵀ / tokens, float32 [columns, columns]."""
        return self.total * (2.0 / max(self.tokens, 1))


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One linear layer after rounding.

    `codes` is int8 [rows, columns] in the integer grid, `scale` bfloat16 [rows, groups], as they are stored.
    """

    codes: Tensor
    scale: Tensor

    def dequantized(self, arguments: QuantizationArgs) -> Tensor:
        """Return the bfloat16 weight that a server computes with."""
        weight: Tensor = dequantize(x_q=self.codes, scale=self.scale, args=arguments, dtype=torch.bfloat16)
        return weight


def quantize_group(
    weights: list[Tensor], hessian: Hessian, arguments: QuantizationArgs, settings: Gptq
) -> list[QuantizedLinear]:
    """Round linear layers that share an input.

    Args:
        weights: bfloat16 [rows_i, columns] each.
        hessian: of their input.
        arguments: compressed-tensors' arguments, symmetric.
        settings: dampening and block size.

    Raises:
        QuantizationError: the inputs are not finite, or the Hessian cannot be factorized.
    """
    mean = hessian.mean()
    if not torch.isfinite(mean).all():
        raise QuantizationError(
            "the calibration activations are not finite", hint="check the checkpoint: validate it against its source"
        )
    stacked = torch.cat(weights).float()
    # The scale is rounded to the dtype it is stored in before anything is rounded by it.
    scale, zero_point = _choose_scale(stacked, arguments)
    rounded, _, fell_back = quantize_weight(
        weights=stacked.clone()[None],
        hessians=mean.clone()[None],
        scale=scale[None],
        zero_point=zero_point[None],
        global_scale=None,
        quant_args=arguments,
        blocksize=settings.block_size,
        percdamp=settings.dampening,
    )
    if bool(fell_back.any()):
        raise QuantizationError(
            "the Hessian of a layer's inputs is not positive definite",
            hint="calibrate with more or more varied text, or raise gptq.dampening in the recipe",
        )
    codes = quantize(x=rounded[0], scale=scale, zero_point=None, args=arguments, dtype=torch.int8)
    rows = [weight.shape[0] for weight in weights]
    return [QuantizedLinear(c, s) for c, s in zip(torch.split(codes, rows), torch.split(scale, rows), strict=True)]


def _choose_scale(weight: Tensor, arguments: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Return bfloat16 scales [rows, groups] by the recipe's observer, and its zero points (all zero when symmetric)."""
    # Upstream's grid search gives up when no group of the whole matrix has improved for a few steps, so that a
    # group's scale would depend on its neighbours; with this patience the whole grid is searched for each.
    own = arguments.model_copy(update={"observer_kwargs": {"patience": _WHOLE_GRID}})
    observer = Observer.load_from_registry(arguments.observer, base_name="weight", args=own)
    observer(weight)
    found = observer.get_qparams()
    return found["scale"].to(torch.bfloat16), found["zero_point"]
