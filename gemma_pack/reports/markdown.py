"""report.md: the whole report for people, verdict first, in Markdown that GitHub renders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gemma_pack.report import MINIMUM_WINDOWS
from gemma_pack.reports import task_table, wording
from gemma_pack.reports.templating import template

if TYPE_CHECKING:
    from gemma_pack.report import Estimate, PromptParity, Report

WORST_PROMPTS: Final = 5


def render_markdown(report: Report, name: str) -> str:
    """Return report.md for the variant called `name`."""
    return template("report.md.j2").render(
        report=report,
        name=name,
        header=wording.header(report),
        rows=wording.rows(report.metrics),
        reasons=wording.reasons(report),
        minimum_windows=MINIMUM_WINDOWS,
        estimates=estimates(report),
        identical=sum(prompt.first_divergent is None for prompt in report.parity.prompts),
        worst_prompts=worst_prompts(report),
        task_header=task_table.HEADER,
        task_rows=task_table.rows(report.tasks) if report.tasks else [],
        audit_header=wording.AUDIT_HEADER,
        audit_rows=wording.audit_rows(report.audit) if report.audit else [],
    )


def estimates(report: Report) -> list[tuple[str, Estimate]]:
    """Return the means whose certainty the report shows, with their labels."""
    return [
        ("ln(perplexity ratio)", report.likelihood.ln_ratio),
        ("mean KL, nats", report.divergence.kl_nats),
        ("same first choice, share", report.divergence.same_top1),
    ]


def worst_prompts(report: Report) -> list[PromptParity]:
    """Return the answers that differ most: empty ones, then those with the largest share of divergent tokens."""
    different = [prompt for prompt in report.parity.prompts if prompt.first_divergent is not None]
    different.sort(key=lambda prompt: (not prompt.variant_empty, -prompt.divergent_share, prompt.first_divergent))
    return different[:WORST_PROMPTS]
