"""`gemma-pack report`: what changed between two validations on the same windows, or one in another form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import with_console

if TYPE_CHECKING:
    from gemma_pack.console import Console


@click.command(
    "report",
    epilog="""\b
Examples:
  gemma-pack report old.report new.report
  gemma-pack report released/report.json \\
      gemma-3-270m-quantized.w4a16.report --format json
  gemma-pack report gemma-3-270m-quantized.w4a16.report --form line""",
)
@click.argument("old", type=click.Path(path_type=Path), metavar="REPORT")
@click.argument("new", type=click.Path(path_type=Path), metavar="[NEW]", required=False)
@click.option(
    "--form",
    type=click.Choice(["line", "markdown", "html", "junit"]),
    default="line",
    show_default=True,
    help="The form of a single report.",
)
@with_console
def command(old: Path, new: Path | None, form: str, console: Console) -> None:
    """Compare two validations and fail on a regression, or print one.

    REPORT and NEW are report.json files, or directories with one. Two must be of the same windows of the same base: a
    measure has changed when the 95 % bound of the paired difference is beyond what bf16 arithmetic does by itself.
    A single one is printed as a line for a log, or as the pages that validate wrote beside it.

    \b
    Exit codes: 0 no regression, 10 the new variant is worse.
    """
    from gemma_pack.console import table
    from gemma_pack.errors import GateFailedError
    from gemma_pack.evaluation.comparison import compare_reports
    from gemma_pack.report import read_report
    from gemma_pack.reports import wording
    from gemma_pack.reports.writing import render

    before = read_report(old)
    if new is None:
        console.result(before, render(before, form, (old if old.is_dir() else old.parent).resolve().stem))
        return
    changes = compare_reports(before, read_report(new))
    console.result(changes, table(wording.change_rows(changes.changes), header=wording.change_header(changes.changes)))
    if changes.regressed:
        worse = [wording.change_label(change) for change in changes.changes if change.outcome == "regressed"]
        raise GateFailedError(
            f"{new} is worse than {old}: {', '.join(worse)}", hint="see both report.html for where it is worst"
        )
