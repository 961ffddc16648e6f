"""Two validations on the same windows: paired, and blind to what bf16 does by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gemma_pack.errors import InvalidUsageError
from gemma_pack.evaluation.comparison import compare_reports
from gemma_pack.report import KernelNoise, Report, WindowSums
from tests.records import text_record
from tests.reports.reports import make_report


def run(kl: float, *, nll: float = 0.0, same: float = 0.83, spread: float = 0.02, **changes: object) -> Report:
    """A report of 64 windows whose difficulty varies far more than runs differ; `kl` and `nll` shift every window."""
    rng = np.random.default_rng(0)
    difficulty = rng.gamma(4, 0.03, 64)
    own = np.random.default_rng(int(1e6 * kl) + 1).normal(0, spread * kl, 64)
    windows = tuple(
        WindowSums(
            tokens=500,
            nll_base=500 * 2.7,
            nll_variant=500 * (2.7 + d + nll),
            kl_nats=500 * float(d + kl + o),
            same_top1=round(500 * same),
        )
        for d, o in zip(difficulty, own, strict=True)
    )
    return make_report(windows=windows, **changes)


def test_a_run_against_itself_shows_no_change() -> None:
    found = compare_reports(run(0.1), run(0.1))
    assert not found.regressed
    assert {change.outcome for change in found.changes} == {"no change shown"}
    assert all(change.difference == 0 for change in found.changes)


def test_a_small_regression_is_seen_because_windows_are_paired() -> None:
    found = compare_reports(run(0.10), run(0.11))
    kl = found.changes[0]
    assert found.regressed
    assert kl.outcome == "regressed"
    assert kl.difference == pytest.approx(0.01, abs=0.002)
    assert 0.0011 < kl.lower < kl.upper
    assert compare_reports(run(0.11), run(0.10)).changes[0].outcome == "improved"


def test_less_than_the_noise_floor_is_no_change() -> None:
    found = compare_reports(run(0.1, spread=0), run(0.1005, spread=0))
    assert found.changes[0].lower > 0
    assert found.changes[0].outcome == "no change shown"


def test_another_kernels_noise_counts_too() -> None:
    old, new = run(0.1), run(0.11)
    kernel = KernelNoise(attention="eager", kl_nats=0.02, same_top1=0.98, ln_ratio=0.0)
    floor = new.noise_floor.model_copy(update={"kernel": kernel})
    assert compare_reports(old, new).regressed
    assert not compare_reports(old, new.model_copy(update={"noise_floor": floor})).regressed


@pytest.mark.parametrize(("same", "outcome"), [(0.79, "regressed"), (0.87, "improved"), (0.82, "no change shown")])
def test_a_share_is_better_when_it_is_higher(same: float, outcome: str) -> None:
    change = compare_reports(run(0.1), run(0.1, same=same)).changes[2]
    assert change.outcome == outcome
    assert change.difference == pytest.approx(100 * (same - 0.83), abs=0.2)


def test_a_worse_likelihood_is_a_regression() -> None:
    found = compare_reports(run(0.1), run(0.1, nll=math.log(1.01)))
    assert [change.outcome for change in found.changes] == ["no change shown", "regressed", "no change shown"]


def test_what_moves_the_base_as_well_is_no_regression() -> None:
    old, new = run(0.1), run(0.1, nll=0.01)
    assert compare_reports(old, new).regressed
    drifted = [w.model_copy(update={"nll_base": w.nll_base + 500 * 0.02}) for w in new.windows]
    assert not compare_reports(old, new.model_copy(update={"windows": tuple(drifted)})).regressed


def test_what_cannot_be_paired_is_refused() -> None:
    report = run(0.1)
    other_text = report.protocol.model_copy(update={"text": text_record().model_copy(update={"sha256": "9" * 64})})
    with pytest.raises(InvalidUsageError, match="different windows"):
        compare_reports(report, report.model_copy(update={"protocol": other_text}))
    other_base = report.base.model_copy(update={"revision": "9" * 40})
    with pytest.raises(InvalidUsageError, match="different bases"):
        compare_reports(report, report.model_copy(update={"base": other_base}))
    served = report.engine.model_copy(update={"name": "vllm"})
    with pytest.raises(InvalidUsageError, match="one report comes from transformers, the other from vllm"):
        compare_reports(report, report.model_copy(update={"engine": served}))
    few = report.model_copy(update={"windows": report.windows[:8]})
    with pytest.raises(InvalidUsageError, match="8 windows are too few"):
        compare_reports(few, few)


@pytest.mark.parametrize(
    ("revision", "old", "new", "paired"),
    [
        (None, "1" * 64, "1" * 64, True),
        (None, "1" * 64, "2" * 64, False),
        (None, None, "2" * 64, True),  # reports from before digests were kept go by the name
        ("9" * 40, "1" * 64, "2" * 64, True),  # one commit, in other shards
    ],
)
def test_two_directories_of_one_name_are_told_apart_by_their_weights(
    revision: str | None, old: str | None, new: str | None, paired: bool
) -> None:
    first, second = (
        run(0.1, base=run(0.1).base.model_copy(update={"revision": revision, "weights_sha256": digest}))
        for digest in (old, new)
    )
    if paired:
        assert not compare_reports(first, second).regressed
        return
    with pytest.raises(InvalidUsageError, match="two that are both called"):
        compare_reports(first, second)


def test_the_same_weights_under_another_name_are_one_base() -> None:
    base = run(0.1).base.model_copy(update={"weights_sha256": "1" * 64})
    renamed = base.model_copy(update={"model_id": "copy", "revision": None})
    assert not compare_reports(run(0.1, base=base), run(0.1, base=renamed)).regressed
