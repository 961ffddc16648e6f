"""Gemma's norms and gated activations on a CPU, each in one pass over its numbers.

By operations of torch they take a third of a decoder's pass where the processor multiplies bf16 matrices fast: a norm
is seven passes over memory, five of them in float32. The formulas, and where they round, are those of the modules in
transformers (modeling_gemma2.py, modeling_gemma3.py, modeling_gemma4.py), whose sums are taken in another order.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from gemma_pack.evaluation.machine_code import compiled, exponential, rounded, summing, widened

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor, nn

    Rows = npt.NDArray[np.int16]
    """Bits of bfloat16 numbers, a row for each vector."""

NORMS: Final = {"Gemma2RMSNorm": 1.0, "Gemma3RMSNorm": 1.0, "Gemma4RMSNorm": 0.0, "Gemma4UnifiedRMSNorm": 0.0}
"""By the module's class, what is added to its weight."""
GATED: Final = ("Gemma2MLP", "Gemma3MLP", "Gemma4TextMLP", "Gemma4UnifiedTextMLP")
ACTIVATION: Final = "gelu_pytorch_tanh"
_SQRT_8_OVER_PI: Final = np.float32(1.5957691216057308)
_CUBIC: Final = np.float32(0.044715)
_FARTHEST: Final = np.float32(30)
"""Beyond it sigmoid(z) is 1 in float32."""


def fuse(module: nn.Module, activation: str) -> None:
    """Let the norms and the gated layers in `module`, on a CPU, compute in one pass; `activation` is its config's."""
    for layer in module.modules():
        kind = type(layer).__name__
        if kind in NORMS:
            layer.forward = functools.partial(_normalized, layer, NORMS[kind], layer.forward)
        elif kind in GATED and activation == ACTIVATION:
            layer.forward = functools.partial(_gated, layer)


def _is_fusible(states: Tensor) -> bool:
    return states.dtype == torch.bfloat16 and states.device.type == "cpu" and not states.requires_grad


def _normalized(norm: Any, added: float, plain: Any, states: Tensor) -> Tensor:  # noqa: ANN401 - a module of transformers
    """Return the RMS norm of bf16 [..., size], times the weight: x (mean x² + ε)^-1/2 (w + `added`)."""
    if not _is_fusible(states):
        normalized: Tensor = plain(states)
        return normalized
    made = torch.empty_like(states)  # laid out as `states`, heads and tokens exchanged or not
    order = sorted(range(states.dim() - 1), key=made.stride, reverse=True)
    weight = getattr(norm, "weight", None)
    scale = torch.ones(states.shape[-1]) if weight is None else weight.detach().float() + added
    normalize_rows(_rows(states, order), scale.numpy(), norm.eps, _rows(made, order))
    return made


def _gated(layer: Any, states: Tensor) -> Tensor:  # noqa: ANN401 - a module of transformers
    """Return the gated layer's output: down(gelu(gate(x)) up(x))."""
    gate, up = layer.gate_proj(states), layer.up_proj(states)
    if _is_fusible(gate):
        product = torch.empty_like(gate)
        gate_rows(*(_rows(each, range(gate.dim() - 1)) for each in (gate, up, product)))
    else:
        product = layer.act_fn(gate) * up
    down: Tensor = layer.down_proj(product)
    return down


def _rows(states: Tensor, order: Any) -> Rows:  # noqa: ANN401 - a sequence of dimensions
    rows: Rows = states.detach().permute(*order, -1).flatten(0, -2).view(torch.int16).numpy()
    return rows


@summing
def _mean_square(row: npt.NDArray[np.int16]) -> np.float32:
    total = np.float32(0)
    for place in range(len(row)):
        x = widened(row[place])
        total += x * x
    return np.float32(total / np.float32(len(row)))


@compiled
def normalize_rows(states: Rows, scale: npt.NDArray[np.float32], epsilon: float, out: Rows) -> None:
    """Write to `out`, bits of bfloat16, the RMS norm of each row of `states` times float32 `scale`."""
    for row in range(len(states)):
        factor = np.float32(1) / np.sqrt(_mean_square(states[row]) + np.float32(epsilon))
        for place in range(states.shape[1]):
            out[row, place] = rounded(widened(states[row, place]) * factor * scale[place])


@compiled
def gate_rows(gate: Rows, up: Rows, out: Rows) -> None:
    """Write to `out` gelu(gate) times up, rounded to bfloat16 after the gelu and again after the product.

    gelu(x) = x/2 (1 + tanh z) = x sigmoid(2z), z = sqrt(2/π) (x + 0.044715 x³), the tanh approximation of Hendrycks and
    Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415.
    """
    for row in range(len(gate)):
        for place in range(gate.shape[1]):
            x = widened(gate[row, place])
            power = exponential(min(_SQRT_8_OVER_PI * (x + _CUBIC * x * x * x), _FARTHEST))
            gelu = widened(rounded(x * (power / (power + np.float32(1)))))
            out[row, place] = rounded(gelu * widened(up[row, place]))
