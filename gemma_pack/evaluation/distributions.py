"""Distributions of the next token under two models, read a part at a time.

The vocabulary is large (262,144), so the logits of a window are never there as a whole. On a CPU each block of them is
summed and dropped while the processor's cache still holds it (`fused.py`). Elsewhere a few tokens are read at once,
their whole distributions, as a textbook has it.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

TOKENS_AT_ONCE: Final = 4096
"""Tokens that the heads run over at once on a CPU; each such pass reads their weights once."""
CACHED_BYTES: Final = 4 << 20
"""Products of one model's head at once on a CPU, which should stay in its cache until they are summed."""
DEVICE_BYTES: Final = 128 << 20
"""Float32 logits of one model at once where they are whole; six such are alive at a time."""


class Scorable(Protocol):
    """What scoring asks of a model; `engines.in_process.Model` says what each does."""

    soft_cap: float | None

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def vocabulary_size(self) -> int:
        """The number of its logits."""

    def hidden(self, ids: Tensor) -> Tensor:
        """Return last hidden states."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary."""

    def products(self, hidden: Tensor, part: slice, room: Tensor) -> Tensor:
        """Return the bf16 products of a part of the vocabulary, before the soft-cap."""

    def fail_not_finite(self, ids: Tensor) -> None:
        """Raise QuantizationError."""


def compare_states(hidden: list[Tensor], base: Scorable, variant: Scorable, rows: Tensor) -> tuple[Tensor, ...]:
    """Return nll_base, nll_variant, kl, delta_p, base_top1, variant_top1, each [tokens].

    `hidden` holds the last hidden states of both for the int64 rows [batch, length].
    """
    import torch

    base_states, variant_states = (states[:, :-1].flatten(0, 1) for states in hidden)
    targets = rows[:, 1:].flatten().to(base.device)
    parts = [
        compare_heads(base, variant, base_states[few], variant_states[few], targets[few])
        for few in _slices(len(targets), TOKENS_AT_ONCE)
    ]
    scored = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    for model, nll in ((base, scored[0]), (variant, scored[1])):
        _require_finite(nll, model, rows)
    return scored


def compare_heads(
    base: Scorable, variant: Scorable, base_states: Tensor, variant_states: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """Return nll_base, nll_variant, kl, delta_p, base_top1 and variant_top1, each [tokens].

    The states are [tokens, hidden], `targets` int64 [tokens]. Rounding can take KL a hair below 0, where no KL is; it
    is set to 0 there.
    """
    compare = _compare_blocks if targets.device.type == "cpu" else _compare_whole
    nll_base, nll_variant, kl, base_top1, variant_top1 = compare(base, variant, base_states, variant_states, targets)
    delta_p = (-nll_variant).exp() - (-nll_base).exp()
    return nll_base, nll_variant, kl.clamp(min=0), delta_p, base_top1.int(), variant_top1.int()


def _compare_blocks(
    base: Scorable, variant: Scorable, base_states: Tensor, variant_states: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """Return nll_base, nll_variant, kl and the highest ids of both, block by block of the vocabulary, on a CPU.

    With x and y the logits of base and variant less their origins, X = Σ exp x, Y = Σ exp y and S = Σ exp(x) (x - y):
    KL = S / X - ln X + ln Y.
    """
    import torch

    from gemma_pack.evaluation.fused import add_block, no_sums

    sums, soft_caps = no_sums(targets.numpy()), (base.soft_cap, variant.soft_cap)
    size = max(1, CACHED_BYTES // (2 * len(targets)))
    rooms = torch.empty(2, len(targets) * size, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        each = pool.map if threads > 1 else map
        shares = sums.split(threads)
        for part in _slices(base.vocabulary_size, size):
            x = base.products(base_states, part, rooms[0]).view(torch.int16).numpy()
            y = variant.products(variant_states, part, rooms[1]).view(torch.int16).numpy()
            add = functools.partial(add_block, soft_caps, part.start)
            list(each(add, np.array_split(x, threads), np.array_split(y, threads), shares))
    total, origin, target, weighted = map(torch.from_numpy, (sums.total, sums.origin, sums.target, sums.weighted))
    nll = (total.log() + origin - target).float()
    kl = (weighted / total[:, 0] - total[:, 0].log() + total[:, 1].log()).float()
    return nll[:, 0], nll[:, 1], kl, *torch.from_numpy(sums.top1).unbind(1)


def _compare_whole(
    base: Scorable, variant: Scorable, base_states: Tensor, variant_states: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """Return the same from the whole distributions of a few tokens at a time."""
    import torch

    parts = []
    for few in _slices(len(targets), _whole_tokens(base)):
        log_p = base.logits(base_states[few]).log_softmax(-1)
        log_q = variant.logits(variant_states[few]).log_softmax(-1)
        read = targets[few, None]
        tops = log_p.argmax(-1), log_q.argmax(-1)
        nll = -log_p.gather(1, read)[:, 0], -log_q.gather(1, read)[:, 0]
        parts.append((*nll, log_q.sub_(log_p).mul_(log_p.exp_()).sum(-1).neg(), *tops))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def mean_nll(model: Scorable, rows: Tensor, *, scored_from: int) -> float:
    """Return the mean -ln p of the tokens at `scored_from` and after, of int64 rows [batch, length]."""
    import torch

    states = model.hidden(rows)[:, scored_from - 1 : -1].flatten(0, 1)
    targets = rows[:, scored_from:].flatten().to(model.device)
    nll = torch.cat(
        [
            torch.nn.functional.cross_entropy(model.logits(states[few]), targets[few], reduction="none")
            for few in _slices(len(targets), _whole_tokens(model))
        ]
    )
    _require_finite(nll, model, rows)
    return float(nll.double().mean())


def soft_capped_(products: Tensor, soft_cap: float | None) -> Tensor:
    """Return float32 products of the head as logits, in place: c tanh(z / c) where there is a soft-cap c."""
    return products if soft_cap is None else products.div_(soft_cap).tanh_().mul_(soft_cap)


def _require_finite(nll: Tensor, model: Scorable, rows: Tensor) -> None:
    import torch

    if not bool(torch.isfinite(nll).all()):
        model.fail_not_finite(rows)


def _whole_tokens(model: Scorable) -> int:
    """Return of how many tokens the whole logits are made at once."""
    return max(1, DEVICE_BYTES // (4 * model.vocabulary_size))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
