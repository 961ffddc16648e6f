"""gemma-pack report: a table, and exit code 10 on a regression."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from gemma_pack.commands import run
from gemma_pack.reports.writing import write_reports
from tests.reports.reports import make_report

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def reports(tmp_path: Path) -> tuple[str, str]:
    """Return the directories of two reports, of which the second is worse."""
    old = make_report()
    worse = tuple(window.model_copy(update={"kl_nats": window.kl_nats + 20}) for window in old.windows)
    write_reports(old, tmp_path / "old", "variant")
    write_reports(old.model_copy(update={"windows": worse}), tmp_path / "new", "variant")
    return str(tmp_path / "old"), str(tmp_path / "new")


def test_a_regression_exits_10(reports: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", *reports]) == 10
    captured = capsys.readouterr()
    assert "regressed" in captured.out
    assert max(map(len, captured.out.splitlines())) <= 80
    assert "mean KL(base‖variant)" in captured.err


def test_an_improvement_exits_0(reports: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", *reversed(reports), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [change["outcome"] for change in found["changes"]] == ["improved", "no change shown", "no change shown"]


def test_a_file_is_as_good_as_its_directory(reports: tuple[str, str]) -> None:
    assert run(["report", reports[0] + "/report.json", reports[0]]) == 0


@pytest.mark.parametrize(
    ("form", "begins"),
    [("line", "PASS old; "), ("markdown", "# PASS: old"), ("html", "<!doctype html>"), ("junit", "<?xml")],
)
def test_a_single_report_is_printed(
    reports: tuple[str, str], capsys: pytest.CaptureFixture[str], form: str, begins: str
) -> None:
    assert run(["report", reports[0], "--form", form]) == 0
    out = capsys.readouterr().out
    assert begins in out[: len(begins) + 40]
    assert (out.count("\n") == 1) == (form == "line")


def test_a_missing_report_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path), str(tmp_path)]) == 1
    assert "gemma-pack validate writes one" in capsys.readouterr().err
