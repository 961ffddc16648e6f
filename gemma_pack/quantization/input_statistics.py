"""What calibration learns about the inputs of linear layers.

GPTQ's Hessian depends on the input alone, so layers that share an input (q/k/v; gate/up) share one, and one pass over
the text serves every recipe of a run.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from compressed_tensors.quantization import QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from gemma_pack.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

    from gemma_pack.quantization.ranks import Ranks


_COLUMNS_AT_A_TIME = 512
"""A symmetric product is summed in blocks of columns, each from its diagonal down: 0.7 of the time at 2048 columns."""


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
    """What calibration learns about the inputs of a group of linears: X Xᵀ, and the largest magnitudes.

    Activations are bfloat16, whose products are exact in float32; the matrix unit may therefore take them as
    bfloat16 (AMX on a CPU) or TF32 (on a GPU) and only has to add in float32.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        """Start from nothing; `columns` is the width of the input."""
        self.total = torch.zeros((columns, columns), dtype=torch.float32, device=device)
        """X Xᵀ, of which the lower triangle counts."""
        self.first = torch.zeros(columns, dtype=torch.float32, device=device)
        """Sum of the windows' first tokens, which are all <bos> and, seeing nothing before them, all the same."""
        self.largest = torch.zeros(columns, dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.windows = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add bfloat16 inputs [windows, tokens, columns], each window from its <bos> on."""
        rows = inputs.flatten(0, 1)
        exact = rows.float()
        with _matrix_unit():
            for begin in range(0, len(self.total), _COLUMNS_AT_A_TIME):
                columns = slice(begin, begin + _COLUMNS_AT_A_TIME)
                self.total[begin:, columns].addmm_(exact[:, begin:].T, exact[:, columns])
        self.first += inputs[:, 0].float().sum(0)
        self.largest = torch.maximum(self.largest, torch.maximum(rows.amax(0), -rows.amin(0)).float())
        self.tokens += rows.shape[0]
        self.windows += inputs.shape[0]

    def merge(self, ranks: Ranks) -> None:
        """Take in what the other processes have seen."""
        for seen in (self.total, self.first, self.tokens, self.windows):
            ranks.add(seen)
        ranks.maximum(self.largest)

    def divided(self, factors: Tensor) -> InputStatistics:
        """Return the statistics of the same inputs divided by float32 [columns]."""
        smaller = InputStatistics(len(factors), self.total.device)
        torch.div(self.total, factors, out=smaller.total).div_(factors[:, None])
        smaller.first = self.first / factors
        smaller.largest = self.largest / factors.abs()
        smaller.tokens, smaller.windows = self.tokens, self.windows
        return smaller

    def hessian(self, sink_share: float) -> Tensor:
        """Return 2 Σ wₜ xₜ xₜᵀ / Σ wₜ over the tokens t, float32 [columns, columns].

        Every later token attends to <bos>, the attention sink (arXiv 2309.17453), so that an error there is an error
        everywhere; a plain mean counts it as one token of a window. Here its weight wₜ is such that the <bos> of all
        windows have `sink_share` of the sum; all others have wₜ = 1. With 0, <bos> is a token like any other.

        Raises:
            QuantizationError: an input was not finite.
        """
        others = (self.tokens - self.windows).clamp_min(1)
        weight = sink_share / (1 - sink_share) * others / self.windows.clamp_min(1) if sink_share else 1.0
        mean = self.total.clone()
        for begin in range(0, len(mean), _COLUMNS_AT_A_TIME):
            these, below = slice(begin, begin + _COLUMNS_AT_A_TIME), slice(begin + _COLUMNS_AT_A_TIME, None)
            mean[these, below] = mean[below, these].T
            corner = mean[these, these].tril()
            mean[these, these] = corner + corner.tril(-1).T
        mean.addr_(self.first, self.first / self.windows.clamp_min(1) * (weight - 1))
        mean.mul_(2.0 / (self.tokens + (weight - 1) * self.windows).clamp_min(1))
        if not torch.isfinite(mean.diagonal()).all():  # Σ x², so that no column with such an input is missed
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
