"""How sure a mean over tokens is, when tokens of one window go together.

Base and variant score the same tokens, so every measure is a paired difference per token. Windows are the
independent unit: a bootstrap draws whole windows with replacement and takes the ratio of sums, Σx / Σn. Its bounds
are BCa (Efron 1987, "Better Bootstrap Confidence Intervals"), because per-window KL is skewed and plain
percentiles would fall short of their confidence, at the levels of Student's t for the number of windows
(Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.2): with 32 windows that matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

import numpy as np

from gemma_pack.report import MINIMUM_WINDOWS

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

DRAWS: Final = 10_000
CONFIDENCE: Final = 0.95
"""One-sided."""
_INDICES_AT_ONCE: Final = 1 << 21
_NORMAL: Final = NormalDist()


@dataclass(frozen=True, slots=True)
class Bounds:
    """A ratio of sums, its one-sided lower and upper bound, and its standard error."""

    value: float
    lower: float
    upper: float
    standard_error: float


def block_bootstrap(
    totals: Floats, tokens: Floats, *, seed: int, draws: int = DRAWS, confidence: float = CONFIDENCE
) -> Bounds:
    """Return Σtotals / Σtokens with its bounds, by drawing windows with replacement.

    `totals` and `tokens` are float64 [windows]: a measure's sum over each window and the number of its tokens. The
    same seed draws the same windows for every measure. With one window nothing is known about the spread: the
    bounds are infinite.
    """
    windows = len(totals)
    value = float(totals.sum() / tokens.sum())
    if windows < 2:
        return Bounds(value, -math.inf, math.inf, math.inf)
    means = _drawn_means(totals, tokens, seed=seed, draws=draws)
    if np.ptp(means) == 0:
        return Bounds(value, value, value, 0.0)
    level = _NORMAL.cdf(-math.sqrt(windows / (windows - 1)) * student_quantile(confidence, windows - 1))
    lower, upper = _bca(means, value, _acceleration(totals, tokens), level)
    return Bounds(value, min(lower, value), max(upper, value), float(means.std(ddof=1)))


def iid_standard_error(values: npt.NDArray[np.floating]) -> float:
    """Return the standard error of the mean of `values` as if they were independent: sd / √N."""
    return float(values.std(ddof=1, dtype=np.float64) / math.sqrt(values.size)) if values.size > 1 else math.inf


def windows_to_decide(
    bounds: Bounds, margin: float, windows: int, *, power: float = 0.8, confidence: float = CONFIDENCE
) -> int | None:
    """Return how many windows, these included, would decide against `margin` with probability `power`.

    The error shrinks with the root of the number: n = W ((z_confidence + z_power) · SE / |margin - value|)². None
    where value and margin are so close that no affordable number (1000 times as many) would.
    """
    distance = abs(margin - bounds.value)
    if not math.isfinite(bounds.standard_error) or distance == 0:
        return None
    z = _NORMAL.inv_cdf(confidence) + _NORMAL.inv_cdf(power)
    needed = windows * (z * bounds.standard_error / distance) ** 2
    return max(MINIMUM_WINDOWS, windows + 1, math.ceil(needed)) if needed <= 1000 * windows else None


def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t, by its expansion in 1 / degrees (Abramowitz and Stegun 26.7.5).

    Within 0.5 % of the exact value for 4 degrees and more, at 0.95.
    """
    z = _NORMAL.inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, 1))


def _drawn_means(totals: Floats, tokens: Floats, *, seed: int, draws: int) -> Floats:
    generator = np.random.default_rng(seed)
    windows = len(totals)
    rows = max(1, _INDICES_AT_ONCE // windows)
    means = []
    for begin in range(0, draws, rows):
        drawn = generator.integers(windows, size=(min(rows, draws - begin), windows))
        means.append(totals[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    return np.concatenate(means)


def _acceleration(totals: Floats, tokens: Floats) -> float:
    """Return BCa's a = Σ u³ / (6 (Σ u²)^1.5) with u from leaving out one window at a time."""
    left_out = (totals.sum() - totals) / (tokens.sum() - tokens)
    spread = left_out.mean() - left_out
    largest = float(np.abs(spread).max())
    if largest == 0:
        return 0.0
    spread /= largest  # a has no unit, and the cubes of tiny numbers are zero
    return float((spread**3).sum() / (6 * (spread**2).sum() ** 1.5))


def _bca(means: Floats, value: float, acceleration: float, level: float) -> tuple[float, float]:
    """Return the bounds at `level` and 1 - `level`, corrected for bias z0 and acceleration a."""
    below = float((means < value).mean() + (means == value).mean() / 2)
    smallest = 0.5 / len(means)  # what so many draws can resolve
    bias = _NORMAL.inv_cdf(min(max(below, smallest), 1 - smallest))
    z = _NORMAL.inv_cdf(max(level, smallest))
    corrected = [
        _NORMAL.cdf(bias + shifted / max(1 - acceleration * shifted, smallest)) for shifted in (bias + z, bias - z)
    ]
    lower, upper = np.quantile(means, corrected)
    return float(lower), float(upper)
