"""Linear layers that stay packed: a variant of compressed-tensors in the memory that it takes on disk.

transformers unpacks such a variant to bf16, at loading or in the first forward pass. Here each layer keeps its codes.
On a CPU, 4-bit codes in groups are multiplied as they are by torch's own kernel; every other scheme, and a GPU,
unpacks one layer's weight for each multiplication and drops it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import forward_quantize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

KERNEL_GROUPS: Final = (32, 64, 128, 256)
"""Group sizes that torch's `_weight_int4pack_mm_for_cpu` takes (aten/src/ATen/native/LinearAlgebra.cpp)."""
KERNEL_ROWS: Final = 16
"""Output rows come in multiples of so many (`_convert_weight_to_int4pack_for_cpu`)."""


class UnpackedEachTime(torch.nn.Module):
    """Any scheme: the weight is unpacked for each multiplication, activations are quantized where the scheme says."""

    def __init__(self, linear: Any) -> None:  # noqa: ANN401 - a Linear that compressed-tensors has packed
        """Take the packed tensors of `linear`."""
        super().__init__()
        self.linear = linear

    def forward(self, states: Tensor) -> Tensor:
        """Return bf16 [..., rows] for bf16 [..., columns]."""
        scheme = self.linear.quantization_scheme
        state = {**dict(self.linear.named_parameters()), **dict(self.linear.named_buffers())}
        bias = state.pop("bias", None)
        weight = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
        if scheme.input_activations:
            states = forward_quantize(self.linear, states, "input", scheme.input_activations)
        return torch.nn.functional.linear(states, weight.to(states.dtype), bias)


class Int4Linear(torch.nn.Module):
    """Symmetric 4-bit codes in groups, multiplied by torch's kernel for CPUs without being unpacked.

    The kernel computes (code - 8) * scale + zero for codes of 0 to 15, so codes of -8 to 7 are shifted and zero is 0.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, group_size: int) -> None:
        """Take int8 codes [rows, columns] and bf16 scales [rows, groups]."""
        super().__init__()
        self.rows, self.group_size = codes.shape[0], group_size
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)  # noqa: SLF001 - torch's name
        scales = torch.stack([scale.t(), torch.zeros_like(scale.t())], dim=-1).contiguous()
        self.register_buffer("codes", packed)
        self.register_buffer("scales", scales)

    def forward(self, states: Tensor) -> Tensor:
        """Return bf16 [..., rows] for bf16 [..., columns]."""
        flat = states.reshape(-1, states.shape[-1])
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(  # noqa: SLF001 - torch's name
            flat, self.codes, self.group_size, self.scales
        )
        return product.reshape(*states.shape[:-1], self.rows)


def keep_packed(model: Any) -> int:  # noqa: ANN401 - a transformers model
    """Replace every packed linear layer of `model`, loaded with `dequantize=False`; return how many there were."""
    model.hf_quantizer.compressor.remove_decompression_hook(model)
    packed = [(name, module) for name, module in model.named_modules() if _is_packed(module)]
    for name, module in packed:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _replacement(module))
    return len(packed)


def _is_packed(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and getattr(module, "quantization_scheme", None) is not None


def _replacement(linear: Any) -> torch.nn.Module:  # noqa: ANN401 - a Linear that compressed-tensors has packed
    weights = linear.quantization_scheme.weights
    state: Mapping[str, Tensor] = dict(linear.named_parameters()) | dict(linear.named_buffers())
    kernel_takes_it = (
        linear.quantization_scheme.format == "pack-quantized"
        and weights.num_bits == 4
        and weights.symmetric
        and weights.group_size in KERNEL_GROUPS
        and linear.quantization_scheme.input_activations is None
        and linear.bias is None
        and "weight_g_idx" not in state
        and state["weight_packed"].device.type == "cpu"
        and state["weight_packed"].shape[0] % KERNEL_ROWS == 0
    )
    if not kernel_takes_it:
        return UnpackedEachTime(linear)
    shape = torch.Size(state["weight_shape"].tolist())
    codes = unpack_from_int32(state["weight_packed"], weights.num_bits, shape)
    return Int4Linear(codes, state["weight_scale"].to(torch.bfloat16), weights.group_size)
