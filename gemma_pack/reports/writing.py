"""Writes a report into its directory: report.json, and all that is rendered from it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from gemma_pack.disk import write_atomic
from gemma_pack.report import REPORT_NAME
from gemma_pack.reports.html import render_html
from gemma_pack.reports.junit import render_junit
from gemma_pack.reports.markdown import render_markdown
from gemma_pack.reports.wording import one_line

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.report import Report

MARKDOWN_NAME: Final = "report.md"
HTML_NAME: Final = "report.html"
JUNIT_NAME: Final = "junit.xml"


SUMMARY_BYTES: Final = 1 << 20
"""GitHub's limit on the summary of a step."""


def append_summary(report: Report, path: Path, name: str) -> None:
    """Append the report to the step summary `path` that GitHub Actions shows; only its head where all is too long."""
    markdown = render_markdown(report, name)
    taken = path.stat().st_size if path.exists() else 0
    if taken + len(markdown.encode()) > SUMMARY_BYTES:
        markdown = markdown.partition("\n## ")[0] + "\n"
    if taken + len(markdown.encode()) > SUMMARY_BYTES:  # GitHub drops all of a summary that is too long
        return
    with path.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            markdown = ("" if stream.read(1) == b"\n" else "\n") + markdown  # an earlier step's last line may be open
        stream.write(markdown.encode())


def render(report: Report, form: str, name: str) -> str:
    """Return the report on the variant called `name` as `line`, `markdown`, `html` or `junit`."""
    forms = {"line": one_line, "markdown": render_markdown, "html": render_html, "junit": render_junit}
    return forms[form](report, name).rstrip("\n")


def write_reports(report: Report, directory: Path, name: str) -> None:
    """Write every rendering of `report`, on the variant called `name`, into `directory`, which may exist.

    report.json comes last: where it is new, the others are of the same run.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / MARKDOWN_NAME, render_markdown(report, name))
    write_atomic(directory / HTML_NAME, render_html(report, name))
    write_atomic(directory / JUNIT_NAME, render_junit(report, name))
    write_atomic(directory / REPORT_NAME, report.encode())
