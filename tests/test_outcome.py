"""The outcome of a variant: it comes back whole from a worker, and the worst of many decides."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gemma_pack.errors import MachineError
from gemma_pack.outcome import VariantOutcome, worst
from gemma_pack.record import Metric
from tests.reports.reports import make_report


def outcome(verdict: str | None) -> VariantOutcome:
    begun = VariantOutcome(model="demo", recipe="w4a16", directory=Path("out/w4a16"))
    if verdict is None:
        return begun.failed("quantize", MachineError("too little memory"))
    return begun.model_copy(update={"report": make_report(verdict=verdict)})


def test_an_outcome_comes_back_whole_from_a_worker() -> None:
    unknown = Metric(
        name="kl_nats", value=1.0, bound=math.inf, opposite_bound=-math.inf, margin=1.0, verdict="undecided"
    )
    begun = outcome("undecided")
    assert begun.report
    sent = begun.model_copy(update={"report": begun.report.model_copy(update={"metrics": (unknown,)})})
    assert VariantOutcome.model_validate_json(sent.model_dump_json()) == sent
    failed = outcome(None)
    assert VariantOutcome.model_validate_json(failed.model_dump_json()) == failed


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["pass", "pass"], 0),
        (["pass", "undecided"], 11),
        (["undecided", "fail", "pass"], 10),
        (["fail", None, "undecided"], 12),
    ],
)
def test_a_stage_that_failed_is_worse_than_a_verdict_and_a_fail_worse_than_an_undecided(
    words: list[str | None], code: int
) -> None:
    assert worst(tuple(map(outcome, words))).exit_code == code
