"""From token scores to the report's numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from gemma_pack.evaluation.likelihood import TokenScores
from gemma_pack.evaluation.measures import (
    KL_EDGES,
    collect_metrics,
    measure_divergence,
    measure_likelihood,
    sum_windows,
)
from gemma_pack.report import Divergence, Likelihood, NoiseFloor, Parity, PromptParity

WORDS = {0: " ", 1: " the", 2: "ing", 3: " 42", 4: ",", 5: "\n\n", 6: " of"}


def make_scores(windows: int = 40, tokens: int = 50, shift: float = 0.02) -> TokenScores:
    rng = np.random.default_rng(0)
    nll = rng.gamma(2, 1.5, (windows, tokens)).astype(np.float32)
    return TokenScores(
        nll_base=nll,
        nll_variant=nll + np.float32(shift),
        kl_nats=rng.gamma(0.5, 0.1, (windows, tokens)).astype(np.float32),
        delta_p=rng.normal(0, 0.05, (windows, tokens)).astype(np.float32),
        base_top1=rng.integers(0, 7, (windows, tokens)).astype(np.int32),
        variant_top1=rng.integers(0, 7, (windows, tokens)).astype(np.int32),
    )


def make_ids(windows: int = 40, tokens: int = 50) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 7, (windows, tokens + 1)).astype(np.int32)


@pytest.fixture
def likelihood() -> Likelihood:
    return measure_likelihood(make_scores(), np.full(40, 210), seed=0)


@pytest.fixture
def divergence() -> Divergence:
    return measure_divergence(make_scores(), make_ids(), lambda ids: "".join(WORDS[i] for i in ids), seed=0)


def test_perplexities_and_their_ratio_agree(likelihood: Likelihood) -> None:
    scores = make_scores()
    assert likelihood.ppl_base == pytest.approx(math.exp(scores.nll_base.astype(float).mean()))
    assert math.log(likelihood.ppl_variant / likelihood.ppl_base) == pytest.approx(likelihood.ln_ratio.value, rel=1e-5)
    assert likelihood.ln_ratio.value == pytest.approx(0.02, rel=1e-4)
    assert likelihood.ln_ratio.standard_error < 1e-6 < likelihood.ppl_base_standard_error  # pairing


def test_bits_per_byte_is_over_the_bytes_of_the_text(likelihood: Likelihood) -> None:
    expected = make_scores().nll_base.astype(float).sum() / (math.log(2) * 40 * 210)
    assert likelihood.bits_per_byte_base == pytest.approx(expected)


def test_percentiles_and_moments_are_numpys(divergence: Divergence) -> None:
    scores = make_scores()
    assert divergence.kl_percentiles["99"] == pytest.approx(np.percentile(scores.kl_nats, 99))
    assert list(divergence.kl_percentiles) == ["min", "0.1", "1", "5", "10", "50", "90", "95", "99", "99.9", "max"]
    assert divergence.delta_p_rms == pytest.approx(np.sqrt((scores.delta_p.astype(float) ** 2).mean()))
    assert divergence.kl_nats.value == pytest.approx(scores.kl_nats.astype(float).mean())
    assert divergence.same_top1.value == pytest.approx((scores.base_top1 == scores.variant_top1).mean())


def test_every_token_is_in_one_bin_one_place_and_one_kind(divergence: Divergence) -> None:
    assert sum(b.tokens for b in divergence.histogram) == 2000
    assert len(divergence.histogram) == len(KL_EDGES) - 1
    places = divergence.by_position
    assert (places[0].begin, places[-1].end) == (1, 51)
    assert all(a.end == b.begin for a, b in pairwise(places))
    width = [p.end - p.begin for p in places]
    assert np.average([p.kl_nats for p in places], weights=width) == pytest.approx(divergence.kl_nats.value)
    assert sum(k.tokens for k in divergence.by_kind) == 2000
    weights = [k.tokens for k in divergence.by_kind]
    assert np.average([k.kl_nats for k in divergence.by_kind], weights=weights) == pytest.approx(
        divergence.kl_nats.value
    )


def test_tokens_are_grouped_by_what_they_look_like(divergence: Divergence) -> None:
    ids = make_ids()[:, 1:]
    found = {k.kind: k.tokens for k in divergence.by_kind}
    for kind, tokens in {
        "white space": (0, 5),
        "start of a word": (1, 6),
        "rest of a word": (2,),
        "digits": (3,),
        "punctuation and the rest": (4,),
    }.items():
        assert found[kind] == np.isin(ids, tokens).sum()


def test_the_worst_tokens_come_first_and_with_what_stood_before(divergence: Divergence) -> None:
    scores, ids = make_scores(), make_ids()
    row, column = np.unravel_index(scores.kl_nats.argmax(), scores.kl_nats.shape)
    first = divergence.worst[0]
    assert first.kl_nats == pytest.approx(float(scores.kl_nats.max()))
    assert first.token == WORDS[int(ids[row, column + 1])]
    assert first.context.endswith(WORDS[int(ids[row, column])]) or column == 0
    assert [w.kl_nats for w in divergence.worst] == sorted((w.kl_nats for w in divergence.worst), reverse=True)


def test_window_sums_give_the_means_back(likelihood: Likelihood, divergence: Divergence) -> None:
    sums = sum_windows(make_scores())
    tokens = sum(w.tokens for w in sums)
    assert tokens == 2000
    ratio = sum(w.nll_variant - w.nll_base for w in sums) / tokens
    assert ratio == pytest.approx(likelihood.ln_ratio.value, rel=1e-4)
    assert sum(w.kl_nats for w in sums) / tokens == pytest.approx(divergence.kl_nats.value)
    assert sum(w.same_top1 for w in sums) / tokens == pytest.approx(divergence.same_top1.value)


def test_a_ruined_variant_has_a_finite_perplexity() -> None:
    found = measure_likelihood(make_scores(shift=2000.0), np.full(40, 210), seed=0)
    assert math.isfinite(found.ppl_variant)
    assert found.ppl_variant > 1e300


@pytest.mark.parametrize(("empty", "verdict"), [(False, "pass"), (True, "fail")])
def test_an_empty_answer_fails_the_gate(
    likelihood: Likelihood, divergence: Divergence, empty: bool, verdict: str
) -> None:
    answer = PromptParity(
        prompt="p",
        templated=False,
        base="a",
        variant="" if empty else "a",
        tokens=1,
        first_divergent=0,
        near_tie=False,
        divergent_share=0.5,
        variant_repeats=0,
        base_ended=True,
        variant_ended=True,
        variant_empty=empty,
    )
    parity = Parity(limit=8, identical_share=0, divergent_share=0.5, prompts=(answer,))
    noise = NoiseFloor(windows=4, batch=1, kl_nats=0.001, same_top1=0.98, ln_ratio=0.0)
    metrics = {metric.name: metric for metric in collect_metrics(noise, likelihood, divergence, parity, [])}
    assert metrics["empty_answers"].verdict == verdict
    assert metrics["greedy_divergent_percent"].value == 50
