"""Scales of an FP8 cache for keys and values, one for each layer and kind (compressed-tensors' `kv_cache_scheme`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from gemma_pack.quantization.ranks import Ranks

_LARGEST: Final = torch.finfo(torch.float8_e4m3fn).max


class KeyValueRange:
    """The largest magnitudes of a layer's keys and values.

    It stands where attention expects its cache, and so sees what a server's cache holds: keys after norm and rotary
    embedding, values after their norm.
    """

    def __init__(self, device: torch.device) -> None:
        """Start from nothing."""
        self._largest = torch.zeros(2, dtype=torch.float32, device=device)

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        """Take in [windows, heads, tokens, head_dim] of both, and give them back."""
        largest = torch.stack([keys.abs().max(), values.abs().max()]).float()
        self._largest = torch.maximum(self._largest, largest)
        return keys, values

    def merge(self, ranks: Ranks) -> None:
        """Take in what the other processes have seen."""
        ranks.maximum(self._largest)

    def scales(self, attention: str) -> dict[str, Tensor]:
        """Return bfloat16 [1] each under the names that servers look for (vLLM, `maybe_remap_kv_scale_name`).

        Args:
            attention: the module's name, `model.layers.0.self_attn`.
        """
        smallest = torch.finfo(torch.bfloat16).tiny
        scales = (self._largest.cpu() / _LARGEST).clamp_min(smallest).to(torch.bfloat16)
        return {f"{attention}.{kind}_scale": scale.reshape(1).clone() for kind, scale in zip("kv", scales, strict=True)}
