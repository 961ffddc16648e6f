"""report.md: the verdict first, every table whole whatever stands in its cells."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from gemma_pack.errors import GemmaPackError
from gemma_pack.record import Metric
from gemma_pack.report import read_report
from gemma_pack.reports.html import render_html
from gemma_pack.reports.markdown import render_markdown, worst_prompts
from gemma_pack.reports.templating import compact, markdown_cell, markdown_code
from gemma_pack.reports.wording import one_line
from gemma_pack.reports.writing import SUMMARY_BYTES, append_summary, write_reports
from tests.reports.reports import answer, full_report, make_report

if TYPE_CHECKING:
    from pathlib import Path

NAME = "gemma-2-9b-it-quantized.w4a16"


def tables(markdown: str) -> list[list[str]]:
    """Return the lines of each table."""
    return [block.split("\n") for block in re.findall(r"(?:^\|.*\n?)+", markdown, re.MULTILINE)]


def columns(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line))


def test_the_verdict_comes_first() -> None:
    assert render_markdown(make_report(), NAME).startswith(f"# PASS: {NAME}\n")


def test_every_row_has_the_columns_of_its_header() -> None:
    found = tables(render_markdown(make_report(), NAME))
    assert len(found) >= 8
    for lines in found:
        widths = {columns(line) for line in lines if line}
        assert len(widths) == 1, lines


def test_what_decides_is_said() -> None:
    metric = Metric(name="same_top1_percent", value=90.5, bound=90.1, margin=91, verdict="fail", unit="%")
    markdown = render_markdown(make_report(verdict="fail", metrics=(metric,)), NAME)
    assert "- same first choice is 90.50 %, the margin ≥ 91.00 %" in markdown
    undecided = metric.model_copy(update={"verdict": "undecided"})
    markdown = render_markdown(make_report(verdict="undecided", metrics=(undecided,), windows_needed=210), NAME)
    assert "- about 210 windows instead of 32 would decide it" in markdown
    report = make_report(verdict="undecided", metrics=(undecided,), windows_needed=32)
    text = report.protocol.text.model_copy(update={"windows": 8})
    few = report.model_copy(update={"protocol": report.protocol.model_copy(update={"text": text})})
    line = "- fewer than 32 windows cannot pass a variant; about 32 windows instead of 8 would decide it"
    assert line in render_markdown(few, NAME)
    assert "fewer than 32 windows would let it pass" in render_markdown(few, NAME)
    assert "cannot pass a variant" not in render_markdown(report, NAME)
    markdown = render_markdown(make_report(verdict="undecided", metrics=(undecided,)), NAME)
    assert "more windows of this text would not decide it" in markdown


def test_the_base_is_named_for_what_it_is() -> None:
    base = make_report().base.model_copy(update={"note": "a dequantized GGUF"})
    assert "> **About the base:** a dequantized GGUF." in render_markdown(make_report(base=base), NAME)


def test_answers_that_differ_most_come_first_and_empty_ones_before_them() -> None:
    report = make_report()
    assert [prompt.prompt for prompt in worst_prompts(report)] == [
        "Name three planets.",
        "1, 2, 4, 8, 16,",
        "Why is the sky blue?",
    ]
    silent = answer("Say something.", "Gladly.", " ", 0, 0.01)
    parity = report.parity.model_copy(update={"prompts": (*report.parity.prompts, silent)})
    assert worst_prompts(make_report(parity=parity))[0] == silent


def test_a_cell_stays_a_cell() -> None:
    assert markdown_cell("a|b\nc`d\\") == "a\\|b⏎c'd\\\\"
    assert markdown_cell("<bos> & *x*\r[a]") == "&lt;bos&gt; &amp; \\*x\\*␍\\[a\\]"
    assert markdown_code("<b>|\\\r\n`") == "<b>\\|\\␍⏎'"


@pytest.mark.parametrize(
    ("number", "written"), [(0, "0"), (0.00012345, "1.2e-04"), (-0.0456, "-0.0456"), (12.345, "12.3")]
)
def test_numbers_keep_three_digits(number: float, written: str) -> None:
    assert compact(number) == written


def test_a_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    report = make_report()
    write_reports(report, tmp_path / "new" / "report", NAME)
    assert read_report(tmp_path / "new" / "report" / "report.json") == report
    assert (tmp_path / "new" / "report" / "report.md").read_text() == render_markdown(report, NAME)


def test_one_line_has_verdict_measures_and_windows() -> None:
    line = one_line(make_report(), "gemma")
    assert line.startswith("PASS gemma; perplexity increase ")
    assert "margin ≤" in line
    assert line.endswith("windows of 512 tokens")
    assert "\n" not in line
    undecided = make_report(verdict="undecided", windows_needed=90)
    assert one_line(undecided, "gemma").endswith("; about 90 would decide")


def test_what_is_new_in_version_2_is_said() -> None:
    rendered = [render_markdown(full_report(), "gemma"), html_text(render_html(full_report(), "gemma"))]
    for text in rendered:
        assert "once more with eager attention" in text
        assert "but kl_nats, given with --gate" in text
        assert "perplexity 70.000 of the base, 71.000 of the variant, by the protocol of papers" in text
        assert "one model after the other" in text


def html_text(page: str) -> str:
    return re.sub(r"<[^>]*>", "", page)


def test_a_step_summary_is_appended_to_and_keeps_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    report = make_report()
    append_summary(report, path, NAME)
    append_summary(report, path, NAME)
    assert path.read_text() == 2 * render_markdown(report, NAME)
    path.write_bytes(b" " * (SUMMARY_BYTES - 3000))
    append_summary(report, path, NAME)
    text = path.read_text().lstrip()
    assert text.startswith("# PASS")
    assert "mean KL" in text
    assert "## " not in text
    assert path.stat().st_size < SUMMARY_BYTES


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no"), (b"{", "no valid report"), (b'{"schema_version": 3}', "schema_version")],
)
def test_a_broken_report_is_a_sentence(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "report.json"
    if content:
        path.write_bytes(content)
    with pytest.raises(GemmaPackError, match=sentence) as caught:
        read_report(path)
    assert caught.value.hint
