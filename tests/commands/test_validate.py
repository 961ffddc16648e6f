"""gemma-pack validate: the table, the exit codes, and a help that tells the truth."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from gemma_pack.commands import run
from gemma_pack.evaluation.profiles import PROFILES
from gemma_pack.record import Metric
from gemma_pack.reports.writing import SUMMARY_BYTES
from tests.reports.reports import make_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.report import Report


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Replace the validation by one that returns the report in this mapping, and keeps what it was asked."""
    kept: dict[str, object] = {"report": make_report()}

    def validate(directory: Path, target: Path, **options: object) -> Report:
        kept.update(options, directory=directory, target=target)
        report: Report = kept["report"]  # type: ignore[assignment]
        return report

    monkeypatch.setattr("gemma_pack.build.validate_variant", validate)
    return kept


def with_verdict(verdict: str) -> Report:
    metric = Metric.model_validate(
        {"name": "kl_nats", "value": 0.06, "bound": 0.07, "margin": 0.05, "verdict": verdict, "unit": "nats"}
    )
    return make_report(verdict=verdict, metrics=(metric,), windows_needed=120 if verdict == "undecided" else None)


@pytest.mark.parametrize(
    ("verdict", "code", "words"),
    [
        ("pass", 0, ""),
        ("fail", 10, "error: the variant is worse than its gate allows: mean KL(base‖variant) is 0.0600 nats"),
        ("undecided", 11, "about 120 windows instead of 32 would decide it"),
    ],
)
def test_the_verdict_is_the_exit_code(
    given: dict[str, object], capsys: pytest.CaptureFixture[str], verdict: str, code: int, words: str
) -> None:
    given["report"] = with_verdict(verdict)
    assert run(["validate", "variant"]) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert re.search(r"mean KL\(base‖variant\) +0\.0600 nats +≤ 0\.0700 +≤ 0\.0500", captured.out)
    assert f"{verdict.upper()}: variant.report/report.html" in captured.out


def test_json_is_the_report(given: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    given["report"] = with_verdict("fail")
    assert run(["validate", "variant", "--format", "json"]) == 10
    captured = capsys.readouterr()
    assert json.loads(captured.out)["metrics"][0]["verdict"] == "fail"
    assert json.loads(captured.err)["error"]["exit_code"] == 10


def test_options_arrive(given: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEMMA_PACK_VALIDATE_PROFILE", "full")
    monkeypatch.setenv("GEMMA_PACK_VALIDATE_REPORT", str(tmp_path))
    assert run(["validate", "variant", "--text", "a.txt", "--seed", "4", "--against", "demo", "--offline"]) == 0
    assert given["profile_name"] == "full"
    assert given["target"] == tmp_path
    assert (given["text"], given["seed"], given["against"], given["offline"]) == ("a.txt", 4, "demo", True)


def test_margins_and_a_second_look_arrive(given: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--gate", "kl_nats=0.02", "--gate", "ppl_increase_percent=1.5", "--extend", "--also", "wikitext2-gptq"]
    assert run(["validate", "variant", *more]) == 0
    assert given["margins"] == {"kl_nats": 0.02, "ppl_increase_percent": 1.5}
    assert (given["extend"], given["gptq_protocol"]) == (True, True)
    capsys.readouterr()
    assert run(["validate", "variant", "--gate", "kl_nats"]) == 2
    assert "kl_nats is no margin" in capsys.readouterr().err


def test_github_gets_a_summary(given: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    given["report"] = with_verdict("fail")
    assert run(["validate", "variant"]) == 10
    assert (tmp_path / "summary.md").read_text().startswith("# FAIL: variant\n")


def test_a_summary_that_cannot_be_written_leaves_the_verdict(
    given: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "not mounted" / "summary.md"))
    for verdict, code in (("pass", 0), ("fail", 10), ("undecided", 11)):
        given["report"] = with_verdict(verdict)
        assert run(["validate", "variant"]) == code
        assert "the summary of the step cannot be written" in capsys.readouterr().err


def test_a_summary_begins_its_own_line_and_stays_within_the_limit(
    given: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    given["report"] = with_verdict("pass")
    for before in ("an earlier step", "an earlier step\n"):
        summary.write_text(before)
        assert run(["validate", "variant"]) == 0
        assert summary.read_text().startswith("an earlier step\n# PASS: variant\n")
    summary.write_text("x" * (SUMMARY_BYTES - 100))
    assert run(["validate", "variant"]) == 0
    assert summary.stat().st_size <= SUMMARY_BYTES


def test_who_looked_twice_is_not_told_to_look_again(
    given: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    report = with_verdict("undecided")
    given["report"] = report.model_copy(
        update={"protocol": report.protocol.model_copy(update={"first_look_windows": 32})}
    )
    assert run(["validate", "variant"]) == 11
    assert "hint: use --profile full, or a longer text with --text" in capsys.readouterr().err


def test_the_help_states_the_profiles_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    run(["validate", "--help"])
    line = r"(\w+) +(\d+) windows of +(\d+) tokens, +(\d+) prompts, +(\d+) scored, +[\d.]+ min"
    found = re.findall(line, capsys.readouterr().out)
    expected = [(p.name, p.windows, p.sequence_length, p.prompts, p.tokens) for p in PROFILES.values()]
    assert found == [(name, *map(str, numbers)) for name, *numbers in expected]


@pytest.mark.parametrize("option", ["--sign-key", "--verify-key"])
def test_a_key_is_of_no_use_for_a_directory(
    given: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "key.pem").touch()
    assert run(["validate", "variant", option, str(tmp_path / "key.pem")]) == 2
    assert "variant is a directory, whose report nobody signs" in capsys.readouterr().err
    assert "target" not in given


def test_the_directory_we_are_in_is_validated_into_one_beside_it(
    given: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "variant").mkdir()
    monkeypatch.chdir(tmp_path / "variant")
    assert run(["validate", "."]) == 0
    assert given["target"] == tmp_path / "variant.report"


@pytest.mark.parametrize(
    ("name", "sentence"), [("file", "is a file"), ("model", "is a checkpoint, which a report would become a part of")]
)
def test_a_report_that_cannot_be_written_there_is_refused_before_anything_is_read(
    raw_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, sentence: str
) -> None:
    raw_checkpoint("model")
    (tmp_path / "file").touch()
    assert run(["validate", str(tmp_path / "nowhere"), "--report", str(tmp_path / name)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_task_that_is_none_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["validate", str(tmp_path / "nowhere"), "--task", "nonesuch"]) == 2
    assert "the harness has no task nonesuch" in capsys.readouterr().err
