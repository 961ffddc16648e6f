"""Activations of a variant, rounded as the servers' kernels round them: scales in float32, codes on the scheme's grid.

compressed-tensors' own simulation takes scales and quotients in the dtype of the activations, bf16, whose rounding
comes on top of the grid's, and casts through float8, which torch does one value at a time on a CPU. The rules here are
those of vLLM (model_executor/layers/quantization): `QuantFP8.forward_native` in input_quant_fp8.py, `ref_nvfp4_quant`
in utils/nvfp4_emulation_utils.py, `per_token_quant_int8` in utils/int8_utils.py. A server multiplies codes and scales
the product; here the rounded states are bf16 again before they are multiplied.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from compressed_tensors.quantization import QuantizationStrategy

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

VALUES_AT_ONCE: Final = 1 << 17
"""Values that a thread of its own rounds at once, so that they and the room beside them, 1 MB, stay in its cache."""
_EXPONENT: Final = 0x7F800000
"""The bits of a float32 that hold its exponent."""
_FLOAT32_MANTISSA_BITS: Final = 23


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that codes stand for: integers, or floats of few bits."""

    largest: float
    smallest_scale: float
    """What a scale may not fall below, so that states of nothing but zeros stay zeros."""
    mantissa_bits: int | None = None
    """None for integers."""
    smallest_normal: float = 0.0
    """The power of two below which floats are evenly spaced."""

    def round_(self, values: Tensor, room: Tensor) -> None:
        """Round float32 `values` of at most `largest` in place, ties to even; `room` is float32 of their shape.

        Adding 1.5 · 2^(e + 23 - m) to a float32 of exponent e and taking it away again leaves m bits of its mantissa,
        rounded by the processor.
        """
        if self.mantissa_bits is None:
            values.round_()
            return
        torch.bitwise_and(values.view(torch.int32), _EXPONENT, out=room.view(torch.int32))
        room.clamp_min_(self.smallest_normal)
        times = 1.5 * 2.0 ** (_FLOAT32_MANTISSA_BITS - self.mantissa_bits)
        values.add_(room, alpha=times).sub_(room, alpha=times)


INT8: Final = Grid(largest=127.0, smallest_scale=torch.finfo(torch.float32).tiny)
E4M3: Final = Grid(largest=448.0, smallest_scale=1 / (448 * 512), mantissa_bits=3, smallest_normal=2.0**-6)
E2M1: Final = Grid(largest=6.0, smallest_scale=torch.finfo(torch.float32).tiny, mantissa_bits=1, smallest_normal=1.0)


@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """How the states that enter a linear layer are quantized."""

    grid: Grid
    group_size: int | None = None
    """Values of a token that share a scale, measured as they come; None: all of a token."""
    scale: float | None = None
    """The scale of all states, measured in calibration; None: measured as they come."""
    global_scale: float | None = None
    """With groups: their scales times this are E4M3 (NVFP4)."""

    def round(self, states: Tensor) -> Tensor:
        """Return `states` [..., columns] rounded to the grid, in their dtype."""
        rounded = torch.empty_like(states, memory_format=torch.contiguous_format)
        rows, out = states.reshape(-1, states.shape[-1]), rounded.view(-1, states.shape[-1])
        alone = rows.device.type == "cpu" and torch.get_num_threads() == 1
        at_once = max(1, min(len(rows), VALUES_AT_ONCE // rows.shape[1] if alone else len(rows)))
        values, room = rows.new_empty(2, at_once, rows.shape[1], dtype=torch.float32)
        for begin in range(0, len(rows), at_once):
            few = rows[begin : begin + at_once]
            self._round_(values[: len(few)].copy_(few), room[: len(few)])
            out[begin : begin + at_once] = values[: len(few)]
        return rounded

    def _round_(self, values: Tensor, room: Tensor) -> None:
        """Round float32 `values` [tokens, columns] in place."""
        if self.group_size is not None:
            groups = len(values), -1, self.group_size
            values, room = values.view(groups), room.view(groups)
        scale = self._measure(values, room) if self.scale is None else self.scale
        values.div_(scale)
        if self.scale is not None or self.global_scale is not None:  # else the largest value gives the largest code
            values.clamp_(-self.grid.largest, self.grid.largest)
        self.grid.round_(values, room)
        values.mul_(scale)

    def _measure(self, values: Tensor, room: Tensor) -> Tensor:
        """Return the scale of each row of float32 `values`, [..., 1]."""
        scale = torch.abs(values, out=room).amax(-1, keepdim=True).div_(self.grid.largest)
        if self.global_scale is not None:
            scale.mul_(self.global_scale).clamp_max_(E4M3.largest)
            E4M3.round_(scale, torch.empty_like(scale))
            scale.div_(self.global_scale)
        return scale.clamp_min_(self.grid.smallest_scale)


def scheme_of(arguments: QuantizationArgs, linear: torch.nn.Module) -> ActivationScheme | None:
    """Return how `arguments` and the scales of `linear` round its inputs; None where no recipe asks for that."""
    kind = f"{arguments.type}{arguments.num_bits}"
    strategy = arguments.strategy
    if not arguments.symmetric:
        return None
    if kind in ("float8", "int8") and arguments.dynamic is True:
        grid = E4M3 if kind == "float8" else INT8
        if strategy == QuantizationStrategy.TOKEN:
            return ActivationScheme(grid)
        if strategy == QuantizationStrategy.GROUP:
            return ActivationScheme(grid, group_size=arguments.group_size)
    if kind == "float8" and not arguments.dynamic and strategy == QuantizationStrategy.TENSOR:
        return ActivationScheme(E4M3, scale=_one_number(linear.input_scale))
    if kind == "float4" and arguments.dynamic == "local" and strategy == QuantizationStrategy.TENSOR_GROUP:
        global_scale = _one_number(linear.input_global_scale)
        return ActivationScheme(E2M1, group_size=arguments.group_size, global_scale=global_scale)
    return None


def _one_number(tensor: Any) -> float:  # noqa: ANN401 - torch's attributes have every type
    return float(tensor.item())


def round_activations(model: torch.nn.Module) -> int:
    """Let the linear layers of `model`, as transformers dequantized it, round their inputs here; return their number.

    Layers whose rounding `scheme_of` does not know stay with compressed-tensors. q/k/v read the same states, and
    gate/up do: each thread keeps the last that it rounded.
    """
    last = threading.local()
    count = 0
    for layer in model.modules():
        quantization: Any = getattr(layer, "quantization_scheme", None)
        if quantization is None or not quantization.input_activations or quantization.output_activations:
            continue
        scheme = scheme_of(quantization.input_activations, layer)
        if scheme is None or "forward" not in vars(layer):
            continue
        del layer.forward  # compressed-tensors' own, on the layer; that of its class remains
        layer.register_forward_pre_hook(_rounding(scheme, last))
        count += 1
    return count


def _rounding(scheme: ActivationScheme, last: threading.local) -> Any:  # noqa: ANN401 - a hook
    def hook(layer: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
        del layer
        (states,) = inputs
        if getattr(last, "states", None) is not states or last.scheme != scheme:
            last.states, last.scheme, last.rounded = states, scheme, scheme.round(states)
        return (last.rounded,)

    return hook
