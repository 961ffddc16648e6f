"""Rows rounded to nearest in compressed-tensors' formats, for recipes that need no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from compressed_tensors.config import CompressionFormat

from gemma_pack.quantization.packing import RoundedLinear, pack
from gemma_pack.quantization.scales import choose_scale
from gemma_pack.quantization.scheme import quantization_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from gemma_pack.recipe import Recipe


class CompressedRows:
    """A `streamed.RowFormat`: scales by the recipe's observer, codes by compressed-tensors."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        """Take a recipe and where to compute."""
        self._scheme = quantization_scheme(recipe)
        self._observer = recipe.observer
        self._device = device
        block = self._scheme.weights.block_structure
        self.divisor: int = block[0] if block else 1
        self.codes = "weight_packed" if self._scheme.format == CompressionFormat.pack_quantized.value else "weight"

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """Return codes and scales of bfloat16 [rows, columns]; packing itself rounds to nearest."""
        weight = rows.to(self._device).float()
        scale, _ = choose_scale(weight, self._scheme.weights, self._observer)
        packed = pack("", RoundedLinear(weight, scale), self._scheme)
        return {name.removeprefix("."): tensor for name, tensor in packed.items() if name != ".weight_shape"}

    def finish(self, shape: tuple[int, ...], joined: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the shape where codes are packed into wider words, which do not tell it."""
        return {**joined, "weight_shape": torch.tensor(shape)} if self.codes == "weight_packed" else joined
