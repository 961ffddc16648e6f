"""GPTQ (arXiv 2210.17323): rounding a weight matrix so that its product with what calibration saw changes least.

Columns are rounded one after the other; each column's error is spread over the columns still to come, weighted by the
Cholesky factor of the inverse Hessian, and columns with large inputs come first. llm-compressor's `quantize_weight`
does the same; this kernel keeps the matrix transposed, so that a column is one run of memory, and rounds by one
function instead of a general fake quantization: a third of the time on a CPU, the same codes (the tests compare them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gemma_pack.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_INNER_COLUMNS = 32
"""Columns whose errors are spread one by one; wider blocks get theirs by matrix products."""
_COLUMNS_AT_A_TIME = 512
"""Of a square matrix that is changed in place: what lies beside it is so many columns."""


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """A factor of the inverse of a dampened Hessian H, H⁻¹ = Mᵀ M with M lower triangular, in an order of the columns.

    The last column is rounded first. With the columns in the opposite order M is the upper Cholesky factor of H⁻¹ that
    the paper has; as the inverse of the lower Cholesky factor of H it takes no inversion of H.
    """

    order: Tensor
    """int64 [columns]: which column is rounded last, last but one …"""
    lower: Tensor
    """float32 [columns, columns]: M."""

    def column_costs(self) -> Tensor:
        """Return float32 [columns], in the matrix's own order: what a squared error of 1 adds to the loss.

        When its turn comes, a column's error e costs e² / M_jj², after all that the columns still to come make up for
        (arXiv 2210.17323, equation 2, whose [H⁻¹]_qq over the columns that are left is M_qq²).
        """
        costs = torch.empty_like(self.lower.diagonal())
        costs[self.order] = self.lower.diagonal() ** -2
        return costs


def factorize(hessian: Tensor, dampening: float) -> InverseFactor:
    """Return the factor by which errors are spread; columns with large inputs are rounded first.

    It takes the Hessian's own memory: at the 36,864 columns of Gemma 2 27B one such matrix is 5.4 GB.

    Args:
        hessian: float32 [columns, columns], symmetric and contiguous; it becomes the factor.
        dampening: share of the mean of the Hessian's diagonal that is added to it.

    Raises:
        QuantizationError: the Hessian cannot be factorized.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, stable=True)
    diagonal[diagonal == 0] = 1  # an input that is always zero: its weights do not matter
    diagonal += dampening * diagonal.mean()
    _permute_(hessian, order)
    # LAPACK's columns are our rows: its upper factor in the transpose is the lower one here, and no copy is made.
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(hessian.T, upper=True, out=(hessian.T, failed))
    if failed:
        raise QuantizationError(
            "the Hessian of a layer's inputs is not positive definite",
            hint="calibrate with more or more varied text, or raise gptq.dampening in the recipe",
        )
    _invert_lower_(hessian)
    return InverseFactor(order, hessian)


def gptq(
    weight: Tensor,
    scale: Tensor,
    groups: Tensor,
    factor: InverseFactor,
    codes: Callable[[Tensor], Tensor],
    *,
    block: int,
) -> Tensor:
    """Return float32 [rows, columns] on the grid of `scale`; two such matrices are made, this one among them.

    Args:
        weight: float32 [rows, columns].
        scale: float32 [rows, groups].
        groups: int64 [columns]: which of the scales is each column's.
        factor: of the inverse Hessian of the inputs.
        codes: rounds weights that were divided by their scale to what the format can hold, in place or not.
        block: columns rounded between two updates of all the rest.
    """
    order, lower = factor.order, factor.lower
    pivots = lower.diagonal()
    rest, steps, group_of = weight.T[order], scale.T.contiguous(), groups[order].tolist()
    inverse_steps = steps.reciprocal()
    rounded, errors = torch.empty_like(rest[0]), torch.empty_like(rest[:block])
    for end in range(len(rest), 0, -block):
        begin = max(end - block, 0)
        for inner_end in range(end, begin, -_INNER_COLUMNS):
            inner = max(inner_end - _INNER_COLUMNS, begin)
            for column in reversed(range(inner, inner_end)):
                step = group_of[column]
                torch.mul(codes(rest[column] * inverse_steps[step]), steps[step], out=rounded)
                error = torch.sub(rest[column], rounded, out=errors[column - begin]).div_(pivots[column])
                rest[column] = rounded
                rest[inner:column].addr_(lower[column, inner:column], error, alpha=-1)
            done = errors[inner - begin : inner_end - begin]
            rest[begin:inner].addmm_(lower[inner:inner_end, begin:inner].T, done, alpha=-1)
        rest[:begin].addmm_(lower[begin:end, :begin].T, errors[: end - begin], alpha=-1)
    result = torch.empty_like(weight)
    result.T[order] = rest
    return result


def _permute_(square: Tensor, order: Tensor) -> None:
    """Bring the rows and the columns of a square matrix into `order`, in its own memory."""
    for part in _parts(len(square)):
        square[:, part] = square[order, part]
    for part in _parts(len(square)):
        square[part] = square[part, order]


def _invert_lower_(lower: Tensor) -> None:
    """Invert a lower triangular matrix in its own memory, as LAPACK's dtrtri does, a block of columns at a time.

    With L = [[A, 0], [B, C]]: L⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]]. C is inverted already; a block of rows of the
    product needs those above it alone, so that the last is computed first.
    """
    parts = _parts(len(lower))
    for number, part in reversed(list(enumerate(parts))):
        corner = lower[part, part]
        identity = torch.eye(len(corner), dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        for rows in reversed(parts[number + 1 :]):
            above = slice(part.stop, rows.stop)
            lower[rows, part] = (lower[rows, above] @ lower[above, part]) @ -inverse
        lower[part, part] = inverse


def _parts(length: int) -> list[slice]:
    return [slice(begin, min(begin + _COLUMNS_AT_A_TIME, length)) for begin in range(0, length, _COLUMNS_AT_A_TIME)]
