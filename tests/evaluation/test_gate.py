"""Three outcomes: within the margin for sure, beyond it for sure, or neither."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.evaluation.gate import judge, judge_costs, overall, windows_needed
from gemma_pack.recipe import GateRow
from gemma_pack.record import Metric
from gemma_pack.report import Estimate

MEASURE = Metric(name="kl_nats", value=0.5)


def estimate(value: float, spread: float) -> Estimate:
    return Estimate(
        value=value, lower=value - spread, upper=value + spread, standard_error=spread / 1.7, iid_standard_error=spread
    )


@pytest.mark.parametrize(
    ("lower", "upper", "verdict"),
    [(0.1, 0.9, "pass"), (0.1, 1.0, "pass"), (0.9, 1.1, "undecided"), (1.0, 1.5, "undecided"), (1.1, 1.5, "fail")],
)
def test_a_cost_passes_below_its_margin(lower: float, upper: float, verdict: str) -> None:
    metric = judge(MEASURE, (0.5, lower, upper), 1.0, 32)
    assert metric.verdict == verdict
    assert metric.bound == upper
    assert metric.margin == 1.0


@pytest.mark.parametrize(
    ("lower", "upper", "verdict"),
    [(91, 95, "pass"), (90, 95, "pass"), (89, 95, "undecided"), (85, 90, "undecided"), (80, 89, "fail")],
)
def test_a_share_passes_above_its_margin(lower: float, upper: float, verdict: str) -> None:
    metric = judge(MEASURE, (0.5, lower, upper), 90, 32, higher_is_better=True)
    assert metric.verdict == verdict
    assert metric.bound == lower


def test_too_few_windows_can_fail_a_variant_but_not_pass_it() -> None:
    assert judge(MEASURE, (0.5, 0.4, 0.6), 1.0, 31).verdict == "undecided"
    assert judge(MEASURE, (0.5, 0.4, 0.6), 0.3, 31).verdict == "fail"


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_what_is_no_number_passes_nothing(higher_is_better: bool) -> None:
    bounds = (math.nan, math.nan, math.nan)
    assert judge(MEASURE, bounds, 1.0, 32, higher_is_better=higher_is_better).verdict == "undecided"


def test_without_a_margin_nothing_is_judged() -> None:
    metric = judge(MEASURE, (0.5, 0.4, 0.6), None, 32)
    assert (metric.verdict, metric.bound, metric.margin) == ("not judged", 0.6, None)


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_wider_margin_never_turns_a_pass_into_a_failure(value: float, spread: float, margin: float) -> None:
    order = ["fail", "undecided", "pass"]
    bounds = (value, value - spread, value + spread)
    verdicts = [judge(MEASURE, bounds, allowed, 32).verdict for allowed in (margin, margin + 0.5)]
    assert order.index(verdicts[0]) <= order.index(verdicts[1])


def test_costs_are_in_the_units_of_the_recipe() -> None:
    row = GateRow(ppl_increase_percent=3, kl_nats=0.05, same_top1_percent=90)
    increase, kl, same = judge_costs(
        estimate(math.log(1.02), 0.001), estimate(0.06, 0.005), estimate(0.9, 0.01), row, windows=32
    )
    assert increase.value == pytest.approx(2.0)
    assert increase.bound == pytest.approx(100 * (1.02 * math.exp(0.001) - 1))
    assert (increase.verdict, kl.verdict, same.verdict) == ("pass", "fail", "undecided")
    assert same.value == pytest.approx(90)
    assert same.bound == pytest.approx(89)


def test_a_ruined_variant_still_has_a_finite_cost() -> None:
    row = GateRow(ppl_increase_percent=3)
    increase, _, _ = judge_costs(estimate(5000.0, 1.0), estimate(1, 0), estimate(0, 0), row, windows=32)
    assert increase.verdict == "fail"
    assert math.isfinite(increase.value)


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        (["pass", "not judged"], "pass"),
        (["pass", "undecided"], "undecided"),
        (["undecided", "fail", "pass"], "fail"),
    ],
)
def test_the_worst_verdict_is_the_gates(verdicts: list[str], worst: str) -> None:
    metrics = [Metric.model_validate({"name": "m", "value": 0, "verdict": verdict}) for verdict in verdicts]
    assert overall(metrics) == worst


def test_windows_needed_is_what_the_least_sure_measure_needs() -> None:
    row = GateRow(ppl_increase_percent=3, kl_nats=0.05)
    sure, unsure = estimate(0.01, 0.001), estimate(0.045, 0.01)
    alone = windows_needed(sure, unsure, sure, GateRow(kl_nats=0.05), 32)
    assert windows_needed(sure, unsure, sure, row, 32) == alone
    assert alone is not None
    assert alone > 32
    assert windows_needed(sure, estimate(0.05, 0.01), sure, row, 32) is None
