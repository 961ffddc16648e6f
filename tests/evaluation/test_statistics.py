"""The bounds hold what they promise: known answers, coverage by simulation, and the odd cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.evaluation.statistics import (
    Bounds,
    block_bootstrap,
    iid_standard_error,
    student_quantile,
    windows_to_decide,
)


def bounds(values: np.ndarray, *, seed: int = 0, draws: int = 2000) -> Bounds:
    return block_bootstrap(values * 500, np.full(len(values), 500.0), seed=seed, draws=draws)


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [(0.95, 4, 2.13185), (0.95, 7, 1.89458), (0.95, 31, 1.69552), (0.95, 100, 1.66023), (0.975, 10, 2.22814)],
)  # tables of Student's t
def test_student_quantiles_are_those_of_the_tables(probability: float, degrees: int, expected: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(expected, rel=5e-4)


def test_known_answer_for_a_normal_mean() -> None:
    values = np.random.default_rng(1).normal(2.0, 0.5, 400)
    found = bounds(values, draws=10_000)
    standard_error = values.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(standard_error, rel=0.03)
    assert found.upper == pytest.approx(values.mean() + 1.6487 * standard_error, abs=0.1 * standard_error)
    assert found.lower == pytest.approx(values.mean() - 1.6487 * standard_error, abs=0.1 * standard_error)


def test_the_value_is_the_ratio_of_sums_not_the_mean_of_ratios() -> None:
    found = block_bootstrap(np.array([1.0, 30.0, 2.0]), np.array([10.0, 100.0, 10.0]), seed=0, draws=100)
    assert found.value == pytest.approx(33 / 120)


@pytest.mark.parametrize(
    ("windows", "draw", "truth"),
    [
        (32, lambda rng, n: rng.normal(1, 1, n), 1.0),
        (32, lambda rng, n: rng.lognormal(0, 0.5, n), math.exp(0.125)),  # as skewed as KL of windows is
        (32, lambda rng, n: rng.binomial(500, 0.9, n) / 500, 0.9),
        (128, lambda rng, n: rng.lognormal(0, 0.5, n), math.exp(0.125)),
    ],
    ids=["normal", "skewed", "share", "skewed and many"],
)
def test_bounds_cover_the_truth_as_often_as_they_say(windows: int, draw: object, truth: float) -> None:
    """Of 1200 experiments, 95 % ± 1.3 % (two standard errors) should hold the truth; skew may cost a little more."""
    rng = np.random.default_rng(7)
    found = [bounds(draw(rng, windows), seed=i, draws=600) for i in range(1200)]  # type: ignore[operator]
    assert 0.925 <= np.mean([b.upper >= truth for b in found]) <= 0.97
    assert 0.925 <= np.mean([b.lower <= truth for b in found]) <= 0.97


def test_tokens_of_a_window_that_go_together_widen_the_bounds() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 1, (64, 1)) + rng.normal(0, 1, (64, 100))
    found = block_bootstrap(shared.sum(axis=1), np.full(64, 100.0), seed=0, draws=2000)
    assert (found.standard_error / iid_standard_error(shared)) ** 2 == pytest.approx(50, rel=0.4)


def test_pairing_sees_what_unpaired_bounds_cannot() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(3, 0.5, 64)
    variant = base + 0.01 + rng.normal(0, 0.005, 64)
    assert bounds(variant - base).lower > 0
    assert bounds(variant).lower < bounds(base).upper


def test_no_difference_has_no_spread() -> None:
    found = bounds(np.zeros(32))
    assert (found.value, found.lower, found.upper, found.standard_error) == (0, 0, 0, 0)


def test_one_window_says_nothing() -> None:
    found = bounds(np.ones(1))
    assert found.value == 1
    assert (found.lower, found.upper) == (-math.inf, math.inf)


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).normal(size=32)
    assert bounds(values, seed=1) == bounds(values, seed=1) != bounds(values, seed=2)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.integers(0, 5))
def test_the_bounds_enclose_the_value(values: list[float], seed: int) -> None:
    found = bounds(np.array(values), seed=seed, draws=50)
    assert found.lower <= found.value <= found.upper


def test_so_many_windows_do_decide() -> None:
    """With the number that is promised, four of five experiments decide."""
    rng = np.random.default_rng(3)
    spread, truth, margin = 0.02, 0.025, 0.03
    first = bounds(rng.normal(truth, spread, 32))
    needed = windows_to_decide(Bounds(truth, first.lower, first.upper, spread / math.sqrt(32)), margin, 32)
    assert needed is not None
    decided = np.mean(
        [bounds(rng.normal(truth, spread, needed), seed=i, draws=400).upper <= margin for i in range(300)]
    )
    assert 0.7 <= decided <= 0.9


def test_a_second_look_makes_no_verdict_less_sure() -> None:
    """A variant exactly at its margin passes wrongly at most as often as one look at 95 % would let it."""
    generator = np.random.default_rng(5)
    wrong = {0.95: 0, 0.975: 0}
    trials = 400
    for _ in range(trials):
        costs = generator.gamma(4, 0.25, 96)  # mean 1, the margin
        for confidence in wrong:
            for windows in (32, 96):
                bounds = block_bootstrap(costs[:windows], np.ones(windows), seed=0, draws=1000, confidence=confidence)
                if bounds.upper <= 1 or bounds.lower > 1:
                    wrong[confidence] += bounds.upper <= 1
                    break
    assert wrong[0.975] / trials <= 0.05
    assert wrong[0.95] > wrong[0.975]  # why each look has half of the 5 %


def test_what_lies_on_its_margin_is_never_decided() -> None:
    assert windows_to_decide(Bounds(0.03, 0.02, 0.04, 0.005), 0.03, 32) is None
    assert windows_to_decide(Bounds(0.03, 0.02, 0.04, 0.005), 0.0300001, 32) is None
    assert windows_to_decide(Bounds(1.0, -math.inf, math.inf, math.inf), 0.5, 1) is None


def test_a_verdict_takes_the_fewest_windows_that_bounds_can_be_trusted_with() -> None:
    assert windows_to_decide(Bounds(0.01, 0.005, 0.02, 0.005), 10.0, 8) == 32
