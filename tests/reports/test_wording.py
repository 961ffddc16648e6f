"""How numbers read in a terminal: every table fits 80 columns."""

from __future__ import annotations

from gemma_pack.console import table
from gemma_pack.record import Metric
from gemma_pack.reports import wording
from tests.reports.reports import make_report

JUDGED = {"ppl_increase_percent": 12.34, "kl_nats": 0.1234, "same_top1_percent": 87.65}


def metric(name: str) -> Metric:
    unit = "nats" if name.endswith("_nats") else "%" if name.endswith("_percent") else ""
    value = JUDGED.get(name, 87.65)
    if name not in JUDGED:
        return Metric(name=name, value=value, unit=unit)
    return Metric(name=name, value=value, bound=value, margin=value, verdict="undecided", unit=unit)


def test_the_table_of_measures_fits_a_terminal() -> None:
    report = make_report()
    method = report.method.model_copy(update={"confidence": 0.975})
    header = wording.header(report.model_copy(update={"method": method}))
    lines = table(wording.narrow_rows(tuple(map(metric, wording.WORDINGS))), header=header).splitlines()
    assert len(lines) == len(wording.WORDINGS) + 2
    assert max(map(len, lines)) <= 80


def test_a_bound_in_a_terminal_has_no_unit_and_elsewhere_has() -> None:
    metrics = (metric("kl_nats"),)
    assert wording.narrow_rows(metrics)[0][1:4] == ["0.1234 nats", "≤ 0.1234", "≤ 0.1234"]
    assert wording.rows(metrics)[0][1:4] == ["0.1234 nats", "≤ 0.1234 nats", "≤ 0.1234 nats"]
