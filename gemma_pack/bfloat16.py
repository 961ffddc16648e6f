"""Products of bfloat16 matrices, on processors without instructions for them too.

On a CPU torch leaves bfloat16 to oneDNN where there is AVX-512 (`mkldnn_bf16_device_check` in ATen), which widens it on
the fly where AVX-512 has no BF16 instructions (Skylake to Ice Lake): 59 GFLOP/s on two cores of such a Xeon, which does
290 in float32. Without AVX-512 torch multiplies value by value: 16 on two cores of an AMD Zen 3, which does 70 to 120.
All of them sum in float32 and round once. So do we, a piece of one matrix in float32 at a time.
"""

from __future__ import annotations

import functools
import platform
import sys
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

FEW_ROWS: Final = 4
"""Up to so many rows torch's own way is about as fast or faster."""
PIECE_VALUES: Final = 1 << 22
"""Values of the right matrix in float32 at a time, at most: 16 MB."""
ROWS_AT_ONCE, COLUMNS_AT_ONCE = 512, 2048
"""Of a product in float32, 4 MB: as fast again as fresh memory for all of it."""


@functools.cache
def is_emulated() -> bool:
    """Return whether this CPU has no instructions for bfloat16 that torch would multiply by."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # noqa: SLF001 - what ATen itself asks
        return has_onednn
    cpu = torch.cpu
    has_instructions = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()  # noqa: SLF001 - no public one
    return platform.machine() in {"x86_64", "AMD64"} and not has_instructions


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left @ right, [..., rows, inner] and [inner, columns], in their dtype; differentiable in `left`.

    Args:
        left: of any dtype; where it is bfloat16 and the CPU has no instructions for it, sums are float32 here too.
        right: of the same dtype.
        out: contiguous, of the product's shape; takes it. Then nothing is differentiable.
    """
    slow = left.dtype == torch.bfloat16 and left.device.type == "cpu" and is_emulated()
    if not slow or left.shape[:-1].numel() <= FEW_ROWS:
        return torch.matmul(left, right, out=out)
    if left.requires_grad and torch.is_grad_enabled():
        differentiable: Tensor = _Product.apply(left, right.detach())  # type: ignore[no-untyped-call]
        return differentiable
    return _in_pieces(left, right.detach(), out)


def multiply_in_float32(module: nn.Module) -> None:
    """Let the linear layers in `module` multiply by `product`, which changes nothing but bfloat16 on such a CPU."""
    if not is_emulated():
        return
    for layer in module.modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__ = Float32Linear  # whose forward compressed-tensors' own, on the layer, calls


def attention(name: str) -> str:
    """Return what transformers calls the attention kernel `name`, sdpa or eager, where bfloat16 goes through float32.

    On such a CPU torch multiplies batches of matrices, as eager attention has them, at about 1 GFLOP/s in bfloat16. Its
    SDPA is as fast as in float32, but not its backward pass.
    """
    if not is_emulated():
        return name
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    wide = f"{name}_in_float32"
    AttentionInterface.register(wide, functools.partial(_attend, name))
    AttentionMaskInterface.register(wide, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return wide


def _attend(  # noqa: PLR0917 - what transformers hands to a kernel
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,  # noqa: ANN401 - each model's own
) -> tuple[Tensor, Tensor | None]:
    """Compute what the kernel `name` computes, in float32 where that is faster; shapes are those of transformers.

    Then scores and probabilities are not rounded on the way to the result.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    family = sys.modules[type(module).__module__]
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(name, family.eager_attention_forward)
    states = (query, key, value)
    if query.device.type == "cpu" and (name == "eager" or query.requires_grad):
        states = (query.float(), key.float(), value.float())
    made, weights = kernel(module, *states, attention_mask, **settings)
    return made.to(query.dtype), weights


class Float32Linear(torch.nn.Linear):
    """A linear layer that multiplies by `product`."""

    def forward(self, states: Tensor) -> Tensor:
        """Return the product of the states and the weight, and the bias on top."""
        made = product(states, self.weight.T)
        return made if self.bias is None else made + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        ctx.save_for_backward(right)
        return _in_pieces(left, right, None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's own
        (right,) = ctx.saved_tensors
        return product(grad_outputs[0], right.T), None


def _in_pieces(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """Return the product, made of float32 pieces: some columns at a time where those are more, else some terms."""
    inner, columns = right.shape
    rows = left.reshape(-1, inner)
    made = torch.empty(*left.shape[:-1], columns, dtype=left.dtype) if out is None else out
    flat = made.view(-1, columns)
    if inner <= columns:
        _by_columns(rows.float(), right, flat)
    else:
        _by_sums(rows, right, flat)
    return made


def _by_columns(rows: Tensor, right: Tensor, out: Tensor) -> None:
    columns = min(COLUMNS_AT_ONCE, max(1, PIECE_VALUES // len(right)), right.shape[1])
    room = torch.empty(ROWS_AT_ONCE * columns)
    for begin in range(0, right.shape[1], columns):
        piece = right[:, begin : begin + columns].float()
        for row in range(0, len(rows), ROWS_AT_ONCE):
            few = rows[row : row + ROWS_AT_ONCE]
            wide = room[: len(few) * piece.shape[1]].view(len(few), -1)
            out[row : row + ROWS_AT_ONCE, begin : begin + columns] = torch.mm(few, piece, out=wide)


def _by_sums(rows: Tensor, right: Tensor, out: Tensor) -> None:
    step = max(1, PIECE_VALUES // right.shape[1])
    total = torch.zeros(len(rows), right.shape[1])
    for begin in range(0, len(right), step):
        total.addmm_(rows[:, begin : begin + step].float(), right[begin : begin + step].float())
    out.copy_(total)
