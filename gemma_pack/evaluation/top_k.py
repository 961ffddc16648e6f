"""KL(base || variant) where only the k most likely tokens of each distribution can be seen.

Let S be the tokens among both models' k most likely, P and Q the shares of base and variant outside S. Taking all
of those for one token gives

    KL_k = Σ_S p (ln p - ln q) + P (ln P - ln Q)

which is never more than the KL (the log-sum inequality; Cover and Thomas, "Elements of Information Theory", 2.7), and
by the chain rule the rest is exactly P · KL(p(·|not S) || q(·|not S)). No bound on it follows from what is seen, but
the text samples it: where the token x that was read is outside S, its p and q are known, and with
r = (q(x) / Q) / (p(x) / P)

    rest = c (r - 1) - ln r  if x is outside S, else 0

has the rest as its mean where the text is distributed as the base says, whatever the constant c, because r has the mean
1. c = 0 and c = 1 are k1 and k3 of J. Schulman, "Approximating KL Divergence", 2020: the one is noisy where the models
are close, the other where they are far apart (r is heavy-tailed). So c is the one that the tokens themselves make
best, as for any control variate: Cov(ln r, r) / Var(r). KL_k and rest together estimate the KL, and the spread of both
is in its bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from gemma_pack.evaluation.likelihood import TokenScores
from gemma_pack.report import NoiseFloor, TopK

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from gemma_pack.evaluation.engines.reading import Reading

    Floats = npt.NDArray[np.float64]

TOP_K: Final = 20
"""Tokens of each distribution that are asked for: what a vLLM server grants unless told otherwise (`max_logprobs`)."""
LARGEST_LN_R: Final = 50.0
"""r beyond e^50 would leave the range in which variances can be computed."""
SMALLEST_SHARE: Final = 1e-9
"""Shares outside S are at least this: what is left of 1 after twenty float32 probabilities is no surer."""


@dataclass(frozen=True, slots=True)
class TokenKl:
    """KL_k, ln r of the token that was read (0 where it is in S) and P, each float64 [tokens]."""

    lower: Floats
    ln_r: Floats
    outside: Floats

    def rest(self, coefficient: float) -> Floats:
        """Return what each token adds for the rest; `coefficient` is c."""
        return coefficient * np.expm1(np.minimum(self.ln_r, LARGEST_LN_R)) - self.ln_r


def compare_readings(base: Sequence[Reading], variant: Sequence[Reading]) -> tuple[TokenScores, TopK]:
    """Return the scores of windows that both models have read, and what lay outside their top k."""
    pairs = [token_kl(theirs, ours) for theirs, ours in zip(base, variant, strict=True)]
    coefficient = control_coefficient(np.concatenate([pair.ln_r for pair in pairs]))
    nll_base, nll_variant = (np.stack([reading.nll for reading in side]) for side in (base, variant))
    scores = TokenScores(
        nll_base=nll_base,
        nll_variant=nll_variant,
        kl_nats=np.stack([pair.lower for pair in pairs]).astype(np.float32),
        kl_rest_nats=np.stack([pair.rest(coefficient) for pair in pairs]).astype(np.float32),
        delta_p=np.exp(-nll_variant) - np.exp(-nll_base),
        base_top1=np.stack([reading.top1 for reading in base]),
        variant_top1=np.stack([reading.top1 for reading in variant]),
    )
    seen = TopK(
        k=min(base[0].top_ids.shape[1], variant[0].top_ids.shape[1]),
        kl_lower_bound_nats=float(np.mean([pair.lower.mean() for pair in pairs])),
        share_outside=float(np.mean([pair.outside.mean() for pair in pairs])),
    )
    return scores, seen


def token_kl(base: Reading, variant: Reading) -> TokenKl:
    """Return the divergence of two readings of one sequence, token by token."""
    same = base.top_ids[:, :, None] == variant.top_ids[:, None, :]  # [tokens, k, k]
    in_both = same.any(2)
    ln_p = base.top_logprobs.astype(np.float64)
    ln_q = np.take_along_axis(variant.top_logprobs.astype(np.float64), same.argmax(2), 1)
    p, q = (np.where(in_both, np.exp(logprobs), 0) for logprobs in (ln_p, ln_q))
    ln_p_read, ln_q_read = -base.nll.astype(np.float64), -variant.nll.astype(np.float64)
    read_in_both = (in_both & (base.top_ids == base.ids[:, None])).any(1)
    outside = [
        np.maximum(1 - seen.sum(1), np.where(read_in_both, SMALLEST_SHARE, np.exp(ln_read)))
        for seen, ln_read in ((p, ln_p_read), (q, ln_q_read))
    ]
    ln_ratio = np.log(outside[0]) - np.log(outside[1])
    lower = np.where(in_both, p * (ln_p - ln_q), 0).sum(1) + outside[0] * ln_ratio
    ln_r = np.where(read_in_both, 0, ln_q_read - ln_p_read + ln_ratio)
    return TokenKl(np.maximum(lower, 0), ln_r, outside[0])


def control_coefficient(ln_r: Floats) -> float:
    """Return c for the tokens outside S, those whose `ln_r` is not 0; 1 where there are too few to tell."""
    far = ln_r[ln_r != 0]
    if len(far) < 2:
        return 1.0
    r = np.exp(np.minimum(far, LARGEST_LN_R))
    spread = float(r.var())
    covariance = float(np.mean((far - far.mean()) * (r - r.mean())))
    return min(1.0, max(0.0, covariance / spread)) if spread else 1.0


def noise_between(first: Sequence[Reading], again: Sequence[Reading], batch: int) -> NoiseFloor:
    """Return how far a model is from itself in two readings of the same windows, the second in batches of `batch`."""
    scores, _ = compare_readings(first, again)
    return NoiseFloor(
        windows=len(first),
        batch=batch,
        kl_nats=float(scores.kl_all_nats.mean(dtype=np.float64)),
        same_top1=float(scores.same_top1.mean()),
        ln_ratio=float((scores.nll_variant - scores.nll_base).mean(dtype=np.float64)),
    )
