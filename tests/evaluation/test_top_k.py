"""KL from the most likely tokens alone: a bound that holds, and an estimate whose mean is the KL."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_pack.evaluation.engines.reading import Reading, ordered
from gemma_pack.evaluation.top_k import compare_readings, control_coefficient, noise_between, token_kl

VOCABULARY = 40

Floats = npt.NDArray[np.float64]


def reading(logprobs: Floats, ids: list[int], k: int) -> Reading:
    """Return what is seen of `logprobs` [tokens, vocabulary] where the tokens `ids` were read."""
    top = np.argsort(-logprobs, axis=1)[:, :k]
    nll = -np.take_along_axis(logprobs, np.array(ids)[:, None], 1)[:, 0]
    return ordered(ids=np.array(ids), nll=nll, top_ids=top, top_logprobs=np.take_along_axis(logprobs, top, 1))


def distributions(seed: int, distance: float) -> tuple[Floats, Floats]:
    generator = np.random.default_rng(seed)
    base = 3 * generator.standard_normal(VOCABULARY)
    variant = base + distance * generator.standard_normal(VOCABULARY)
    normal = [logits - np.log(np.exp(logits).sum()) for logits in (base, variant)]
    return normal[0], normal[1]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), distance=st.floats(0, 3), k=st.integers(1, VOCABULARY), c=st.floats(0, 1))
def test_the_bound_is_never_above_the_kl_and_the_estimates_mean_is_the_kl(
    seed: int, distance: float, k: int, c: float
) -> None:
    base, variant = distributions(seed, distance)
    kl = float(np.sum(np.exp(base) * (base - variant)))
    every = list(
        range(VOCABULARY)
    )  # each token of the vocabulary read once, weighted by how likely the base says it is
    rows = [np.tile(logprobs, (VOCABULARY, 1)) for logprobs in (base, variant)]
    found = token_kl(reading(rows[0], every, k), reading(rows[1], every, k))
    assert found.lower.max() <= kl + 1e-5
    assert float(np.sum(np.exp(base) * (found.lower + found.rest(c)))) == pytest.approx(kl, abs=1e-4, rel=1e-3)


def test_all_of_a_vocabulary_leaves_nothing_to_estimate() -> None:
    base, variant = (logprobs[None, :] for logprobs in distributions(1, 1.0))
    found = token_kl(reading(base, [3], VOCABULARY), reading(variant, [3], VOCABULARY))
    assert found.lower[0] == pytest.approx(float(np.sum(np.exp(base) * (base - variant))), rel=1e-4)
    assert found.rest(1.0)[0] == 0
    assert found.outside[0] < 1e-6


def test_known_answer() -> None:
    # with k = 2, the first two tokens are in both top k, and the rest is one token
    base, variant = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    found = token_kl(reading(base, [2], 2), reading(variant, [2], 2))
    assert found.lower[0] == pytest.approx(0.25 * np.log(2), rel=1e-6)
    assert found.outside[0] == pytest.approx(0.25)
    assert found.rest(1.0)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("distance", "tolerance"), [(0.03, 0.1), (0.3, 0.1), (2.0, 0.1)])
def test_a_sampled_text_finds_the_kl_of_close_and_of_distant_models(distance: float, tolerance: float) -> None:
    base, variant = distributions(3, distance)
    kl = float(np.sum(np.exp(base) * (base - variant)))
    text = np.random.default_rng(0).choice(VOCABULARY, size=20_000, p=np.exp(base)).tolist()
    windows = [reading(np.tile(logprobs, (len(text), 1)), text, 4) for logprobs in (base, variant)]
    scores, seen = compare_readings(windows[:1], windows[1:])
    assert float(scores.kl_all_nats.mean()) == pytest.approx(kl, rel=tolerance)
    assert seen.kl_lower_bound_nats < 0.9 * kl  # so that the estimate had something to add


def test_the_coefficient_is_near_one_for_close_models_and_near_none_for_heavy_tails() -> None:
    generator = np.random.default_rng(0)
    assert control_coefficient(0.01 * generator.standard_normal(1000)) > 0.95
    assert control_coefficient(3 * generator.standard_normal(1000)) < 0.3
    assert control_coefficient(np.zeros(10)) == 1


def test_scores_of_windows_and_the_noise_between_equal_readings() -> None:
    base, variant = distributions(5, 0.5)
    readings = [reading(np.tile(logprobs, (4, 1)), [0, 1, 2, 3], 5) for logprobs in (base, variant)]
    scores, seen = compare_readings([readings[0]] * 2, [readings[1]] * 2)
    assert scores.kl_nats.shape == scores.kl_all_nats.shape == scores.base_top1.shape == (2, 4)
    assert scores.delta_p[0] == pytest.approx(np.exp(variant[:4]) - np.exp(base[:4]), abs=1e-6)
    assert (seen.k, seen.kl_lower_bound_nats) == (5, pytest.approx(float(scores.kl_nats.mean()), rel=1e-5))
    assert 0 < seen.share_outside < 1
    floor = noise_between([readings[0]], [readings[0]], batch=1)
    assert (floor.kl_nats, floor.same_top1, floor.ln_ratio) == (pytest.approx(0, abs=1e-6), 1, 0)
