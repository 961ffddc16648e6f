"""`gemma-pack report`: what changed between two validations on the same windows."""

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
  gemma-pack report released/report.json gemma-3-270m-quantized.w4a16.report --format json""",
)
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@with_console
def command(old: Path, new: Path, console: Console) -> None:
    """Compare two validations, and fail on a regression.

    OLD and NEW are report.json files, or directories with one, of the same windows of the same base. A measure has
    changed when the 95 % bound of the paired difference is beyond what bf16 arithmetic does by itself.

    \b
    Exit codes: 0 no regression, 10 the new variant is worse.
    """
    from gemma_pack.console import table
    from gemma_pack.errors import GateFailedError
    from gemma_pack.evaluation.comparison import compare_reports
    from gemma_pack.report import read_report
    from gemma_pack.reports import wording

    changes = compare_reports(read_report(old), read_report(new))
    console.result(changes, table(wording.change_rows(changes.changes), header=wording.CHANGE_HEADER))
    if changes.regressed:
        worse = [wording.change_label(change) for change in changes.changes if change.outcome == "regressed"]
        raise GateFailedError(
            f"{new} is worse than {old}: {', '.join(worse)}", hint="see both report.html for where it is worst"
        )
