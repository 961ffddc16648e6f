"""junit.xml: a case for each judged row."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from gemma_pack.record import Metric
from gemma_pack.reports.junit import render_junit
from tests.reports.reports import make_report


def test_a_pass_is_a_suite_without_failures() -> None:
    root = ET.fromstring(render_junit(make_report(), "variant"))  # noqa: S314 - our own
    suite = root[0]
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("3", "0", "0")
    assert [case.get("name") for case in suite] == ["perplexity increase", "mean KL(base‖variant)", "same first choice"]
    assert suite[0].findtext("system-out") == "value 1.50 %, bound ≤ 1.88 %, margin ≤ 3.00 %"


def test_failed_is_a_failure_and_undecided_an_error() -> None:
    metrics = (
        Metric(name="kl_nats", value=0.06, bound=0.07, margin=0.05, verdict="fail", unit="nats"),
        Metric(name="same_top1_percent", value=91, bound=90, margin=91, verdict="undecided", unit="%"),
        Metric(name="<&>", value=1, bound=1, margin=2, verdict="pass"),
        Metric(name="ppl_base", value=11),
    )
    root = ET.fromstring(render_junit(make_report(verdict="fail", metrics=metrics), "a & b"))  # noqa: S314 - our own
    suite = root[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    failure, error, passed = suite
    assert failure.find("failure") is not None
    assert "margin ≤ 0.0500 nats" in failure.find("failure").get("message", "")  # type: ignore[union-attr]
    assert error.find("error") is not None
    assert [child.tag for child in passed] == ["system-out"]
