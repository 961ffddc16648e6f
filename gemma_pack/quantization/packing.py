"""A rounded linear layer and the tensors that stand for it on disk, in compressed-tensors' own formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compressed_tensors.quantization import QuantizationScheme
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class RoundedLinear:
    """One linear layer after rounding.

    `weight` is float32 [rows, columns] and lies on the grid of the scales. `scale` is in the dtype it is stored in:
    [rows, groups], [rows, 1], [1] or [row blocks, column blocks] as the scheme has it. `global_scale` (float32 [1])
    belongs to NVFP4; `input_scale` ([1]) to static activations, under the name that the format gives it.
    """

    weight: Tensor
    scale: Tensor
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None


def pack(name: str, linear: RoundedLinear, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Return the tensors that replace `name`.weight, on the CPU, by their names in the variant."""
    state = {"weight": linear.weight, "weight_scale": linear.scale}
    if linear.global_scale is not None:
        state["weight_global_scale"] = linear.global_scale
    packed = _compressor(scheme).compress(state, scheme)
    if linear.input_scale is not None:
        key = "input_global_scale" if linear.global_scale is not None else "input_scale"
        packed[key] = linear.input_scale
    # layers on one input share its scale, and safetensors refuses tensors that share memory
    return {f"{name}.{key}": value.cpu().clone(memory_format=torch.contiguous_format) for key, value in packed.items()}


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """Return the bfloat16 weight that a server computes with, from the tensors that `pack` made."""
    prefix = f"{name}."
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    weight: Tensor = _compressor(scheme).decompress(state, scheme)["weight"]
    return weight.to(torch.bfloat16)


def unpack_codes(name: str, tensors: Mapping[str, Tensor], scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
    """Return int8 codes [rows, columns] and bfloat16 scales [rows, groups] of a `pack-quantized` layer."""
    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], scheme.weights.num_bits, shape)
    return codes, tensors[f"{name}.weight_scale"]


def _compressor(scheme: QuantizationScheme) -> type[BaseCompressor]:
    compressor: type[BaseCompressor] = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor
