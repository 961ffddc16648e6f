"""From scores of single tokens to the measures of the report: means with bounds, percentiles, and where it is worst.

Sums run in float64. Bits per byte = Σℓ / (ln 2 · bytes of the text).
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gemma_pack.evaluation.statistics import CONFIDENCE, block_bootstrap, iid_standard_error
from gemma_pack.record import Metric
from gemma_pack.report import (
    Divergence,
    Estimate,
    HistogramBin,
    KindMean,
    Likelihood,
    PositionBin,
    TokenSpot,
    WindowSums,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from gemma_pack.evaluation.likelihood import TokenScores
    from gemma_pack.report import NoiseFloor, Parity, TopK

PERCENTILES: Final = (0.1, 1, 5, 10, 50, 90, 95, 99, 99.9)
POSITION_BINS: Final = 16
KL_EDGES: Final = (0.0, *(10 ** (exponent / 4) for exponent in range(-24, 7)))
"""Edges of the histogram of KL in nats: 0, then four bins a decade from 1e-6 to 32."""
WORST_TOKENS: Final = 12
CONTEXT_TOKENS: Final = 12
"""Tokens of context that the report shows before a token with a large KL."""
KINDS: Final = (
    ("white space", r"\s+"),
    ("digits", r"\s*\d+"),
    ("start of a word", r"\s+[^\W\d_].*"),
    ("rest of a word", r"[^\W\d_].*"),
    ("punctuation and the rest", r".*"),
)
"""Kinds of tokens by what they decode to; the first pattern that fits counts."""


def measure_likelihood(
    scores: TokenScores, text_bytes: npt.NDArray[np.int64], seed: int, *, confidence: float = CONFIDENCE
) -> Likelihood:
    """Return perplexities, their ratio and bits per byte; `text_bytes` is int64 [windows]."""
    base, variant = (_estimate(nll, seed, confidence) for nll in (scores.nll_base, scores.nll_variant))
    bits = scores.nll_base.size / (math.log(2) * float(text_bytes.sum()))
    return Likelihood(
        ppl_base=math.exp(base.value),
        ppl_variant=_exp(variant.value),
        ppl_base_standard_error=math.exp(base.value) * base.standard_error,
        ppl_variant_standard_error=_exp(variant.value) * variant.standard_error,
        ln_ratio=_estimate(scores.nll_variant - scores.nll_base, seed, confidence),
        bits_per_byte_base=base.value * bits,
        bits_per_byte_variant=variant.value * bits,
    )


def measure_divergence(
    scores: TokenScores,
    ids: npt.NDArray[np.int32],
    decode: Callable[[Sequence[int]], str],
    seed: int,
    top_k: TopK | None = None,
    *,
    confidence: float = CONFIDENCE,
) -> Divergence:
    """Return KL, Δp and same first choices, over all tokens and by place and kind.

    `ids` is int32 [windows, sequence_length], the windows that `scores` are of; `decode` turns ids into text; `top_k`
    says what an engine that shows only the most likely tokens left unseen.
    """
    kl, delta_p = scores.kl_nats, scores.delta_p
    counts, _ = np.histogram(np.clip(kl, 0, KL_EDGES[-1]), bins=KL_EDGES)
    return Divergence(
        kl_nats=_estimate(scores.kl_all_nats, seed, confidence),
        top_k=top_k,
        kl_percentiles=_percentiles(kl),
        same_top1=_estimate(scores.same_top1, seed, confidence),
        delta_p_rms=float(np.sqrt(np.mean(np.square(delta_p, dtype=np.float64)))),
        delta_p_percentiles=_percentiles(delta_p),
        by_position=_by_position(kl),
        by_kind=_by_kind(kl, ids[:, 1:], decode),
        histogram=tuple(
            HistogramBin(begin=begin, end=end, tokens=int(count))
            for begin, end, count in zip(KL_EDGES[:-1], KL_EDGES[1:], counts, strict=True)
        ),
        worst=_worst(scores, ids, decode),
    )


def collect_metrics(
    noise: NoiseFloor, likelihood: Likelihood, divergence: Divergence, parity: Parity, judged: Sequence[Metric]
) -> tuple[Metric, ...]:
    """Return the rows of the report's table: the noise floor, perplexities, what the gate judged, what it did not."""
    empty = sum(prompt.variant_empty for prompt in parity.prompts)
    unended = sum(prompt.base_ended and not prompt.variant_ended for prompt in parity.prompts)
    repeated = float(np.mean([prompt.variant_repeats for prompt in parity.prompts]))
    return (
        Metric(name="noise_kl_nats", value=noise.kl_nats, unit="nats"),
        Metric(name="noise_same_top1_percent", value=100 * noise.same_top1, unit="%"),
        *([Metric(name="noise_kernel_kl_nats", value=noise.kernel.kl_nats, unit="nats")] if noise.kernel else []),
        Metric(name="ppl_base", value=likelihood.ppl_base),
        Metric(name="ppl_variant", value=likelihood.ppl_variant),
        *judged,
        *_top_k_metrics(divergence.top_k),
        Metric(name="kl_p99_nats", value=divergence.kl_percentiles["99"], unit="nats"),
        Metric(name="delta_p_rms_percent", value=100 * divergence.delta_p_rms, unit="%"),
        Metric(name="bits_per_byte_base", value=likelihood.bits_per_byte_base),
        Metric(name="bits_per_byte_variant", value=likelihood.bits_per_byte_variant),
        Metric(name="greedy_identical_percent", value=100 * parity.identical_share, unit="%"),
        Metric(name="greedy_divergent_percent", value=100 * parity.divergent_share, unit="%"),
        Metric(name="repeated_4grams_percent", value=100 * repeated, unit="%"),
        Metric(name="unended_answers", value=unended),
        Metric(name="empty_answers", value=empty, margin=0, verdict="fail" if empty else "pass"),
    )


def _top_k_metrics(seen: TopK | None) -> tuple[Metric, ...]:
    if seen is None:
        return ()
    return (
        Metric(name="kl_lower_bound_nats", value=seen.kl_lower_bound_nats, unit="nats"),
        Metric(name="share_outside_top_k_percent", value=100 * seen.share_outside, unit="%"),
    )


def sum_windows(scores: TokenScores) -> tuple[WindowSums, ...]:
    """Return the sums of each window."""
    columns = (
        scores.nll_base.sum(axis=1, dtype=np.float64),
        scores.nll_variant.sum(axis=1, dtype=np.float64),
        scores.kl_all_nats.sum(axis=1, dtype=np.float64),
        scores.same_top1.sum(axis=1),
    )
    tokens = scores.nll_base.shape[1]
    return tuple(
        WindowSums(
            tokens=tokens, nll_base=float(base), nll_variant=float(variant), kl_nats=float(kl), same_top1=int(same)
        )
        for base, variant, kl, same in zip(*columns, strict=True)
    )


def _estimate(values: npt.NDArray[Any], seed: int, confidence: float) -> Estimate:
    """Return the mean of `values` [windows, tokens] with its bounds."""
    totals = values.sum(axis=1, dtype=np.float64)
    bounds = block_bootstrap(totals, np.full(len(values), float(values.shape[1])), seed=seed, confidence=confidence)
    return Estimate(
        value=bounds.value,
        lower=bounds.lower,
        upper=bounds.upper,
        standard_error=bounds.standard_error,
        iid_standard_error=iid_standard_error(values),
    )


def _percentiles(values: npt.NDArray[np.float32]) -> dict[str, float]:
    found = np.percentile(values.astype(np.float64), (0, *PERCENTILES, 100))
    names = ("min", *(f"{percentile:g}" for percentile in PERCENTILES), "max")
    return dict(zip(names, map(float, found), strict=True))


def _by_position(kl: npt.NDArray[np.float32]) -> tuple[PositionBin, ...]:
    edges = np.unique(np.linspace(0, kl.shape[1], POSITION_BINS + 1).astype(int))
    return tuple(
        PositionBin(begin=int(begin) + 1, end=int(end) + 1, kl_nats=float(kl[:, begin:end].mean(dtype=np.float64)))
        for begin, end in pairwise(edges)
    )


def _by_kind(
    kl: npt.NDArray[np.float32], read: npt.NDArray[np.int32], decode: Callable[[Sequence[int]], str]
) -> tuple[KindMean, ...]:
    """Group tokens by what was read; each distinct token is decoded once."""
    tokens, places = np.unique(read, return_inverse=True)
    kinds = np.array([_kind(decode([int(token)])) for token in tokens])[places.reshape(read.shape)]
    return tuple(
        KindMean(kind=name, tokens=int((kinds == i).sum()), kl_nats=float(kl[kinds == i].mean(dtype=np.float64)))
        for i, (name, _) in enumerate(KINDS)
        if (kinds == i).any()
    )


def _kind(text: str) -> int:
    return next(i for i, (_, pattern) in enumerate(KINDS) if re.fullmatch(pattern, text, re.DOTALL))


def _worst(
    scores: TokenScores, ids: npt.NDArray[np.int32], decode: Callable[[Sequence[int]], str]
) -> tuple[TokenSpot, ...]:
    places = np.argsort(-scores.kl_nats, axis=None, kind="stable")[:WORST_TOKENS]
    spots = []
    for row, column in zip(*np.unravel_index(places, scores.kl_nats.shape), strict=True):
        begin = max(1, column + 1 - CONTEXT_TOKENS)
        spots.append(
            TokenSpot(
                context=decode([int(token) for token in ids[row, begin : column + 1]]),
                token=decode([int(ids[row, column + 1])]),
                kl_nats=float(scores.kl_nats[row, column]),
                base_top1=decode([int(scores.base_top1[row, column])]),
                variant_top1=decode([int(scores.variant_top1[row, column])]),
            )
        )
    return tuple(spots)


def _exp(value: float) -> float:
    """Return e^value, or the end of the range of floats, so that a ruined variant is still reported."""
    return math.exp(min(value, 700))
