"""KL divergence between two models that share their head, and its gradient, without ever holding all logits.

A Gemma has 262,144 tokens in its vocabulary: logits of 512 tokens in float32 are 0.5 GB, and automatic differentiation
of a log-softmax keeps several copies. The gradient of KL(p || q) with respect to q's logits is simply q - p, so
`kl_to_base` computes loss and gradient together, a few rows at a time while they are in the processor's cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma_pack.bfloat16 import product
from gemma_pack.quantization.memory import TOKENS_A_PRODUCT

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS_A_ROW_BLOCK = 8
"""Rows of logits worked on in float32 at a time: 8 MB at a vocabulary of 262,144, which caches hold."""


class _KlToBase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, base_hidden: Tensor, head: Tensor, soft_cap: float | None) -> Tensor:  # noqa: ANN401 - torch's own
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), TOKENS_A_PRODUCT):
            span = slice(start, start + TOKENS_A_PRODUCT)
            logits, base_logits = product(hidden[span], head.T), product(base_hidden[span], head.T)
            for row in range(0, len(logits), _TOKENS_A_ROW_BLOCK):
                rows = slice(row, row + _TOKENS_A_ROW_BLOCK)
                kl, logits[rows] = _kl_and_gradient(logits[rows].float(), base_logits[rows].float(), soft_cap)
                total += kl
            if ctx.needs_input_grad[0]:
                gradient[span] = product(logits, head)
        ctx.save_for_backward(gradient / len(hidden))
        return (total / len(hidden)).float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401 - torch's own
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None


def kl_to_base(hidden: Tensor, base_hidden: Tensor, head: Tensor, soft_cap: float | None) -> Tensor:
    """Return mean KL(base || model) in nats a token over the full vocabulary, differentiable in `hidden`.

    Args:
        hidden: bfloat16 [tokens, width], the model's hidden states after the final norm.
        base_hidden: the same of the base.
        head: bfloat16 [vocabulary, width].
        soft_cap: Gemma 2 caps logits, x → cap · tanh(x / cap), before the softmax; None where there is none.
    """
    result: Tensor = _KlToBase.apply(hidden, base_hidden, head, soft_cap)  # type: ignore[no-untyped-call]
    return result


def _kl_and_gradient(logits: Tensor, base_logits: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    """Return the sum of KL over the rows, and its gradient with respect to the logits before the cap."""
    slope = None
    if soft_cap is not None:
        base_logits = torch.tanh_(base_logits / soft_cap) * soft_cap
        tanh = torch.tanh_(logits / soft_cap)
        logits, slope = tanh * soft_cap, 1 - tanh.square()
    base_logits -= base_logits.logsumexp(-1, keepdim=True)
    logits -= logits.logsumexp(-1, keepdim=True)
    p = base_logits.exp()
    base_logits -= logits
    kl = torch.dot(p.flatten(), base_logits.flatten()).double()
    gradient = logits.exp_().sub_(p)
    return kl, gradient if slope is None else gradient * slope
