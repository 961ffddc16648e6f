"""The proof that smoothing changed nothing, on the model at hand, before its weights are rounded.

A wrong pair of norm and linears looks plausible and is ruinous: those that llm-compressor falls back to for Gemma
multiply the perplexity of Gemma 3 270M by 10¹⁰. Two windows run through base and smoothed layers side by side, in
float32 so that bfloat16's own noise does not hide anything; each layer is compared before it is rounded, and the
next-token distributions at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from gemma_pack.errors import QuantizationError
from gemma_pack.gemma import text_config
from gemma_pack.quantization.decoder import Decoder
from gemma_pack.quantization.transforms import smoothed_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from gemma_pack.quantization.transforms import Smoothed

WINDOWS: Final = 2
TOKENS: Final = 128
MAX_DIFFERENCE: Final = 1e-3
"""Of a layer's output, relative to its norm. Float32 leaves less than 1e-5; a wrong pair leaves more than 0.1."""
MAX_KL_NATS: Final = 1e-5
_TOKENS_AT_A_TIME, _ROWS_AT_A_TIME = 32, 1 << 15
"""Of float32 logits, 34 MB for each model at a vocabulary of 262,144, and of the head beside them."""


class Equivalence:
    """Two windows on their way through the base's layers, and through the smoothed ones."""

    def __init__(self, decoder: Decoder, ids: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Embed the beginning of int32 [windows, tokens] as `decoder`, which holds the base's embedding, does."""
        ids = ids[:WINDOWS, :TOKENS]
        self._decoder = Decoder(decoder.checkpoint, decoder.device, torch.float32, decoder.embedding)
        self._soft_cap: float | None = text_config(decoder.checkpoint.config).get("final_logit_softcapping")
        self._base = self._decoder.embed(ids)
        self._smoothed = self._base.clone()
        self._arguments = self._decoder.layer_arguments(*ids.shape)

    @torch.no_grad()
    def advance(self, index: int, groups: Sequence[Sequence[str]], smoothed: Sequence[Smoothed | None]) -> None:
        """Run layer `index` of both.

        Args:
            index: the layer; call with each in turn.
            groups: its linears by input, as module names.
            smoothed: what became of each group; None where it stays as it is.

        Raises:
            QuantizationError: the layer's outputs differ.
        """
        layer: Any = self._decoder.load_layer(index)
        arguments = self._arguments[self._decoder.kinds[index]]
        self._base = layer(self._base, **arguments)
        tensors = self._decoder.tensors(index)
        for group, change in zip(groups, smoothed, strict=True):
            for name, weight in zip(group, smoothed_weights(group, tensors, groups, smoothed), strict=True):
                layer.get_submodule(self._decoder.within_layer(name)).weight.copy_(weight)
            if change is not None and change.norm is not None:
                norm = self._decoder.within_layer(change.norm).removesuffix(".weight")
                layer.get_submodule(norm).weight.copy_(change.norm_weight)
        self._smoothed = layer(self._smoothed, **arguments)
        difference = float((self._smoothed - self._base).norm() / self._base.norm())
        if not difference <= MAX_DIFFERENCE:
            raise QuantizationError(
                f"smoothing changed what layer {index} computes by {difference:.1e} of its norm; nothing was kept",
                hint="leave smoothing out of the recipe, and please report the model",
            )

    @torch.no_grad()
    def kl_nats(self) -> float:
        """Return mean KL(base || smoothed) of the next token, once all layers have run.

        Raises:
            QuantizationError: it is more than `MAX_KL_NATS`.
        """
        base, smoothed = (self._decoder.finish(states).flatten(0, 1) for states in (self._base, self._smoothed))
        total = 0.0
        for begin in range(0, len(base), _TOKENS_AT_A_TIME):
            tokens = slice(begin, begin + _TOKENS_AT_A_TIME)
            p, q = (self._log_probabilities(states[tokens]) for states in (base, smoothed))
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        kl_nats = total / len(base)
        if not kl_nats <= MAX_KL_NATS:
            raise QuantizationError(
                f"smoothing changed the model: KL {kl_nats:.1e} nats, where rounding errors leave {MAX_KL_NATS:g}",
                hint="leave smoothing out of the recipe, and please report the model",
            )
        return kl_nats

    def _log_probabilities(self, states: Tensor) -> Tensor:
        """Return those of the next token, float32 [tokens, vocabulary]; the head is never in float32 as a whole."""
        logits = torch.cat(
            [states @ part.float().T for part in torch.split(self._decoder.embedding, _ROWS_AT_A_TIME)], dim=-1
        )
        if self._soft_cap is not None:
            logits = torch.tanh_(logits.div_(self._soft_cap)).mul_(self._soft_cap)
        return logits.log_softmax(-1)
