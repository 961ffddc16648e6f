"""Distributions of the next token under two models, read block by block of the vocabulary.

The vocabulary is large (262,144), so the logits of a window are never there as a whole: each block of them is made,
turned into its share of the sums and dropped while the processor's cache still holds it.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

TOKENS_AT_ONCE: Final = 4096
"""Tokens that the heads run over at once; each such pass reads their weights once."""
CACHED_BYTES: Final = 4 << 20
"""Float32 logits of one model at once on a CPU. Those of both pass through ten operations and should stay in its cache;
on two cores 2 to 6 MB measure alike, and 16 MB take a quarter longer."""
DEVICE_BYTES: Final = 128 << 20
"""The same elsewhere, where starting an operation costs more than the memory it passes over."""


FARTHEST: Final = 40.0
"""How far the highest logit may be from what is subtracted: exp(40) of each of 10^6 tokens is 2e23, of 1e38 in float32,
and exp(-40) is 4e-18, of 1e-38."""


class Scorable(Protocol):
    """What scoring asks of a model; `engines.in_process.Model` says what each does."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def vocabulary_size(self) -> int:
        """The number of its logits."""

    def hidden(self, ids: Tensor) -> Tensor:
        """Return last hidden states."""

    def logits(self, hidden: Tensor, part: slice, out: Tensor, room: Tensor) -> Tensor:
        """Write the logits of a part of the vocabulary."""

    def fail_not_finite(self, ids: Tensor) -> None:
        """Raise QuantizationError."""


class Softmax:
    """The softmax of one model at each token, summed block by block of the vocabulary.

    `top1` is the id of the highest logit z so far, `total` is Σ exp(z - origin), `target` the logit of the token that
    was read; each [tokens]. The origin is 0 while that keeps the sums well inside float32, as it does for Gemma, and
    takes no pass over the logits. Where the highest logit leaves it by more than `FARTHEST`, the origin moves there,
    and earlier sums shrink by exp(old - new), as in Milakov and Gimelshein, "Online normalizer calculation for
    softmax", arXiv 1805.02867, algorithm 3.
    """

    def __init__(self, targets: Tensor) -> None:
        """Take the ids of the tokens that were read, int64 [tokens]."""
        import torch

        def filled(value: float) -> Tensor:
            return torch.full(targets.shape, value, dtype=torch.float32, device=targets.device)

        self._targets, self._by_target = targets.sort()
        self._sorted_targets: list[int] = self._targets.tolist()
        self._highest = filled(torch.finfo(torch.float32).min)
        self.top1 = torch.zeros_like(targets)
        self._origin, self.total, self.target = filled(0), filled(0), filled(0)
        self._moved = False

    def shift(self, logits: Tensor, begin: int) -> Tensor | None:
        """Take float32 logits [tokens, block] of the ids from `begin` on, and subtract the origin in place.

        Returns:
            By how much the shifted logits of earlier blocks change, [tokens]; None: not at all.
        """
        import torch

        highest = logits.amax(-1)
        risen = (highest > self._highest).nonzero()[:, 0]  # few, and an index takes six times as long as a maximum
        self.top1[risen] = logits[risen].argmax(-1) + begin
        inside = slice(*(bisect.bisect_left(self._sorted_targets, end) for end in (begin, begin + logits.shape[1])))
        places = self._by_target[inside]
        self.target[places] = logits[places, self._targets[inside] - begin]
        self._highest = torch.maximum(self._highest, highest)
        change = None
        if begin == 0:
            self._start()
        elif self._moved or not float(highest.max()) <= FARTHEST:
            change = self._move()
        if self._moved:
            logits.sub_(self._origin[:, None])
        return change

    def _start(self) -> None:
        """Let the origin be where the logits of the first block are, if 0 is far from them."""
        import torch

        self._origin = torch.where(self._highest.abs() > FARTHEST, self._highest, self._origin)
        self._moved = bool(self._origin.any())

    def _move(self) -> Tensor:
        """Move the origin of the tokens whose highest logit is far above it; return the change, [tokens]."""
        import torch

        origin = torch.where(self._highest - self._origin > FARTHEST, self._highest, self._origin)
        change, self._origin, self._moved = self._origin - origin, origin, True
        self.total.mul_(change.exp())
        return change

    def add(self, exponentials: Tensor) -> None:
        """Add exp of the shifted logits to the total."""
        self.total.add_(exponentials.sum(-1))

    @property
    def nll(self) -> Tensor:
        """-ln p of the token that was read, once all blocks have been."""
        return (self.log_total + self._origin - self.target).float()

    @property
    def log_total(self) -> Tensor:
        """Ln of the total, float64: of the difference of two such, what float32 rounds off would be seen."""
        return self.total.double().log()


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

    The states are [tokens, hidden], `targets` int64 [tokens]. With x and y the logits of base and variant less their
    origins, X = Σ exp x, Y = Σ exp y and S = Σ exp(x) (x - y): KL = S / X - ln X + ln Y. Where a block moves the
    origins, so that x changes by d and y by e, X of the blocks before becomes exp(d) X, and with that
    S becomes exp(d) S + (d - e) X. Rounding can take KL a hair below 0, where no KL is; it is set to 0 there.
    """
    import torch

    base_softmax, variant_softmax = Softmax(targets), Softmax(targets)
    weighted = torch.zeros_like(base_softmax.total)
    size = _block_size(targets)
    blocks = torch.empty(3, len(targets), size, device=targets.device)  # once: fresh memory costs as much as a pass
    room = blocks[2].view(torch.bfloat16).flatten()  # idle while there are products
    for part in _slices(base.vocabulary_size, size):
        x, y, weights = blocks[:, :, : part.stop - part.start]
        base.logits(base_states, part, x, room)
        variant.logits(variant_states, part, y, room)
        change, other = base_softmax.shift(x, part.start), variant_softmax.shift(y, part.start)
        if change is not None:
            weighted.mul_(change.exp()).add_(change * base_softmax.total)
        if other is not None:
            weighted.sub_(other * base_softmax.total)
        base_softmax.add(torch.exp(x, out=weights))
        weighted.add_(weights.mul_(x.sub_(y)).sum(-1))
        variant_softmax.add(y.exp_())
    kl = (weighted / base_softmax.total - base_softmax.log_total + variant_softmax.log_total).float()
    nll_base, nll_variant = base_softmax.nll, variant_softmax.nll
    delta_p = (-nll_variant).exp() - (-nll_base).exp()
    return nll_base, nll_variant, kl.clamp_(min=0), delta_p, base_softmax.top1.int(), variant_softmax.top1.int()


def mean_nll(model: Scorable, rows: Tensor, *, scored_from: int) -> float:
    """Return the mean -ln p of the tokens at `scored_from` and after, of int64 rows [batch, length]."""
    import torch

    states = model.hidden(rows)[:, scored_from - 1 : -1].flatten(0, 1)
    targets = rows[:, scored_from:].flatten().to(model.device)
    losses = []
    for few in _slices(len(targets), TOKENS_AT_ONCE):
        softmax = Softmax(targets[few])
        size = _block_size(targets[few])
        block = torch.empty(len(targets[few]), size, device=targets.device)
        room = torch.empty(block.numel(), dtype=torch.bfloat16, device=targets.device)
        for part in _slices(model.vocabulary_size, size):
            logits = model.logits(states[few], part, block[:, : part.stop - part.start], room)
            softmax.shift(logits, part.start)
            softmax.add(logits.exp_())
        losses.append(softmax.nll)
    nll = torch.cat(losses)
    _require_finite(nll, model, rows)
    return float(nll.double().mean())


def _require_finite(nll: Tensor, model: Scorable, rows: Tensor) -> None:
    import torch

    if not bool(torch.isfinite(nll).all()):
        model.fail_not_finite(rows)


def _block_size(targets: Tensor) -> int:
    """Return how much of the vocabulary to read at once for so many tokens."""
    budget = CACHED_BYTES if targets.device.type == "cpu" else DEVICE_BYTES
    return max(1, budget // (4 * len(targets)))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
