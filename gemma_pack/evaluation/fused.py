"""The sums behind two softmaxes and their divergence, in one pass over a block of logits on a CPU.

By operations of torch each sum is a pass over memory of its own, and the exponential one by one is most of the time.
Here a row of both models' logits is widened, capped, exponentiated and summed while it is in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from gemma_pack.evaluation.machine_code import compiled, exponential, summing, widened

if TYPE_CHECKING:
    import numpy.typing as npt

    Row = npt.NDArray[np.int16]
    """Bits of bfloat16 logits of a token, before the soft-cap."""
    Block = npt.NDArray[np.int16]
    """Such rows of some tokens."""
    SoftCaps = tuple[float | None, float | None]
    """Of base and variant."""

SPAN: Final = 512
"""Logits of a row that are summed in float32 before they join the float64 sums."""
FARTHEST: Final = 40.0
"""How far the highest logit may be from what is subtracted: exp(40) of each of 10^6 tokens is 2e23, of 1e38 in float32,
and exp(-40) is 4e-18, of 1e-38."""
_INFINITE: Final = np.int16(0x7F80)
"""The bits of an infinite bfloat16; those of NaN are higher."""


class Sums(NamedTuple):
    """What was summed of each token, [tokens, 2]: of the base, then of the variant; `weighted` is of both, [tokens].

    `read` is the id of the token that was read. With z the logits, c the origin and x = z - c: `total` is Σ exp x,
    `weighted` is Σ exp(x) (x - y) with x the base's and y the variant's, `highest` is max z, `top1` its id, `target`
    the logit of the token that was read.
    """

    read: npt.NDArray[np.int64]
    origin: npt.NDArray[np.float64]
    total: npt.NDArray[np.float64]
    weighted: npt.NDArray[np.float64]
    highest: npt.NDArray[np.float64]
    target: npt.NDArray[np.float64]
    top1: npt.NDArray[np.int64]

    def split(self, count: int) -> list[Sums]:
        """Return the sums of so many runs of the tokens, in the same memory."""
        return [Sums(*columns) for columns in zip(*(np.array_split(column, count) for column in self), strict=True)]


def no_sums(read: npt.NDArray[np.int64]) -> Sums:
    """Return the sums before any block, of tokens of which the ids `read` were read."""
    tokens = len(read)
    return Sums(
        read=read,
        origin=np.zeros((tokens, 2)),
        total=np.zeros((tokens, 2)),
        weighted=np.zeros(tokens),
        highest=np.full((tokens, 2), -np.inf),
        target=np.zeros((tokens, 2)),
        top1=np.zeros((tokens, 2), np.int64),
    )


@compiled
def _ordered(bits: np.int16) -> np.int16:
    """Return a bfloat16's bits so that they compare as the numbers do, or such bits as they were."""
    return np.int16(bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF)))


@compiled
def _capped(bits: np.int16, soft_cap: float | None) -> np.float32:
    """Return a logit z after the soft-cap c: c tanh(z / c); c is None where there is none."""
    z = widened(bits)
    if soft_cap is None:
        return z
    cap = np.float32(soft_cap)
    doubled = min(max(np.float32(2) / cap * z, np.float32(-30)), np.float32(30))
    return cap - np.float32(2) * cap / (exponential(doubled) + np.float32(1))


@compiled
def _highest(logits: Row) -> tuple[np.int16, bool]:
    """Return the bits of the highest of a row of logits, and whether none is NaN or infinite.

    Integers, since these are compared 32 at a time, and floats one by one.
    """
    lowest, highest = np.int16(0x7FFF), np.int16(-0x8000)
    for place in range(len(logits)):
        key = _ordered(logits[place])
        highest = max(highest, key)
        lowest = min(lowest, key)
    return _ordered(highest), bool(lowest > -_INFINITE - 1 and highest < _INFINITE)


@compiled
def _look(logits: Row, soft_cap: float | None, begin: int, sums: Sums, at: tuple[int, int]) -> float:
    """Note the highest of a row of logits of the ids from `begin` on; return how far up it leaves the origin.

    It is 0 where the highest stays within `FARTHEST`, and NaN where a logit is NaN or infinite.
    """
    bits, finite = _highest(logits)
    if not finite:
        return np.nan
    highest = _capped(bits, soft_cap)
    if highest > sums.highest[at]:
        sums.highest[at] = highest
        for place in range(len(logits)):
            if _capped(logits[place], soft_cap) == highest:
                sums.top1[at] = begin + place
                break
    if begin == 0 and abs(highest) > FARTHEST:
        sums.origin[at] = highest
    distance = highest - sums.origin[at]
    return distance if distance > FARTHEST else 0.0


@compiled
def _move(sums: Sums, token: int, up: tuple[float, float]) -> None:
    """Let both models' logits of a token be counted from origins that are higher by `up`, as if they always had been.

    Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867, algorithm 3. Where x changes
    by -d and y by -e, X becomes exp(-d) X, and S becomes exp(-d) S + (e - d) X with that X.
    """
    for which in range(2):
        sums.origin[token, which] += up[which]
        sums.total[token, which] *= np.exp(-up[which])
    sums.weighted[token] = np.exp(-up[0]) * sums.weighted[token] + (up[1] - up[0]) * sums.total[token, 0]


@compiled
def _shifted(bits: np.int16, soft_cap: float | None, origin: np.float32) -> np.float32:
    """Return a logit less its origin, rounded as it is of a model that is compared with itself."""
    return _capped(bits, soft_cap) - origin


@summing
def _add(base: Row, variant: Row, soft_caps: SoftCaps, sums: Sums, token: int) -> None:
    """Add the exponentials of a row of both models' logits."""
    base_origin, variant_origin = np.float32(sums.origin[token, 0]), np.float32(sums.origin[token, 1])
    base_total, variant_total, weighted = np.float32(0), np.float32(0), np.float32(0)
    for place in range(len(base)):
        x = _shifted(base[place], soft_caps[0], base_origin)
        y = _shifted(variant[place], soft_caps[1], variant_origin)
        weight = exponential(x)
        base_total += weight
        weighted += weight * (x - y)
        variant_total += exponential(y)
    sums.total[token, 0] += base_total
    sums.total[token, 1] += variant_total
    sums.weighted[token] += weighted


@compiled
def add_block(soft_caps: SoftCaps, begin: int, base: Block, variant: Block, sums: Sums) -> None:
    """Add a block of logits to the sums.

    Args:
        soft_caps: of both models.
        begin: the first id of the block.
        base: the bits of its bfloat16 logits of the ids from `begin` on, before the soft-cap, [tokens, block].
        variant: likewise.
        sums: of these tokens. Where a logit is NaN or infinite, that model's `total` becomes NaN.
    """
    for token in range(len(base)):
        for start in range(0, base.shape[1], SPAN):
            x, y = base[token, start : start + SPAN], variant[token, start : start + SPAN]
            up = (
                _look(x, soft_caps[0], begin + start, sums, (token, 0)),
                _look(y, soft_caps[1], begin + start, sums, (token, 1)),
            )
            if up != (0.0, 0.0):
                _move(sums, token, up)
            _add(x, y, soft_caps, sums, token)
        place = sums.read[token] - begin
        if 0 <= place < base.shape[1]:
            sums.target[token, 0] = _capped(base[token, place], soft_caps[0])
            sums.target[token, 1] = _capped(variant[token, place], soft_caps[1])
