"""`gemma-pack validate`: is the variant as good as its base, within a stated margin, and how sure is that?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import with_console

if TYPE_CHECKING:
    from gemma_pack.console import Console
    from gemma_pack.report import Report


@click.command(
    "validate",
    epilog="""\b
Examples:
  gemma-pack validate gemma-3-270m-quantized.w4a16 --profile quick
  gemma-pack validate gemma-2-9b-it-quantized.w4a16 --profile full --text Salesforce/wikitext:wikitext-2-raw-v1""",
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="The bf16 base  [default: what the variant's record names]")
@click.option(
    "--profile",
    type=click.Choice(["smoke", "quick", "full"]),
    default="quick",
    show_default=True,
    help="How many windows and prompts, see above.",
)
@click.option("--text", default="builtin", show_default=True, help="Hub dataset, .txt or .jsonl file, or builtin.")
@click.option("--recipe", help="Recipe whose gate judges  [default: the variant's recipe.yaml]")
@click.option("--report", type=click.Path(path_type=Path), help="Directory of the report  [default: DIRECTORY.report]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Windows and draws.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
@click.option("--offline", is_flag=True, help="Use no network.")
@with_console
def command(
    directory: Path,
    against: str | None,
    profile: str,
    text: str,
    recipe: str | None,
    report: Path | None,
    seed: int,
    device: str,
    console: Console,
    *,
    offline: bool,
) -> None:
    """Judge a variant against its bf16 base by its gate.

    DIRECTORY is what quantize wrote. Base and variant read the same text and answer the same prompts; the gate is
    the recipe's.

    \b
    Profiles:
      smoke    8 windows of  256 tokens,   4 prompts: does it run?
      quick   32 windows of  512 tokens,  16 prompts: a verdict
      full   256 windows of 1024 tokens, 128 prompts: a surer one

    Writes report.json, report.html, report.md and junit.xml, and the verdict into gemma-pack.json and README.md of
    the variant. In GitHub Actions the report is shown as the summary of the step, too.

    \b
    Exit codes: 0 pass, 10 the gate failed, 11 undecided: more windows are needed.
    """
    from gemma_pack.build import validate_variant
    from gemma_pack.console import table
    from gemma_pack.reports import wording
    from gemma_pack.reports.writing import append_summary

    target = report or directory.with_name(directory.name + ".report")
    outcome = validate_variant(
        directory,
        target,
        against=against,
        profile_name=profile,
        text=text,
        recipe_name=recipe,
        seed=seed,
        device=device,
        offline=offline,
        reporter=console,
    )
    shown = table(wording.rows(outcome.metrics), header=wording.HEADER)
    console.result(outcome, f"{shown}\n\n{wording.VERDICT_WORDS[outcome.verdict]}: {target / 'report.html'}")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        append_summary(outcome, Path(summary), directory.resolve().name)
    raise_verdict(outcome, target)


def raise_verdict(report: Report, target: Path) -> None:
    """Raise GateFailedError or GateUndecidedError for a report that is no pass; `target` holds the report."""
    from gemma_pack.errors import GateFailedError, GateUndecidedError
    from gemma_pack.reports.wording import reasons

    why = "; ".join(reasons(report))
    if report.verdict == "fail":
        raise GateFailedError(f"the variant is worse than its gate allows: {why}", hint=f"see {target / 'report.html'}")
    if report.verdict == "undecided":
        raise GateUndecidedError(
            f"the evidence is too small for a verdict: {why}",
            hint="use --profile full, or a longer text with --text",
        )
