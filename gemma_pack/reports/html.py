"""report.html: one self-contained page, verdict first, that reads on a phone, in the dark and on paper.

It fetches nothing and runs no script; its Content-Security-Policy says so. All text of models and prompts is escaped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_pack.reports import charts, task_table, wording
from gemma_pack.reports.markdown import estimates, worst_prompts
from gemma_pack.reports.templating import template

if TYPE_CHECKING:
    from gemma_pack.report import Report


def render_html(report: Report, name: str) -> str:
    """Return the page about the variant called `name`."""
    divergence = report.divergence
    rows = [
        (metric, cells, charts.gauge(metric, higher_is_better=wording.is_higher_better(metric)))
        for metric, cells in zip(report.metrics, wording.rows(report.metrics), strict=True)
    ]
    return template("report.html.j2").render(
        report=report,
        name=name,
        words=wording.VERDICT_WORDS,
        reasons=wording.reasons(report),
        header=wording.header(report),
        rows=rows,
        histogram=charts.histogram(divergence.histogram, divergence.kl_nats.value),
        positions=charts.positions(divergence.by_position),
        identical=sum(prompt.first_divergent is None for prompt in report.parity.prompts),
        answers=[(prompt, *_parted(prompt.base, prompt.variant)) for prompt in worst_prompts(report)],
        estimates=estimates(report),
        task_header=task_table.HEADER,
        task_rows=task_table.rows(report.tasks) if report.tasks else [],
        audit_header=wording.AUDIT_HEADER,
        audit_rows=wording.audit_rows(report.audit) if report.audit else [],
    )


def _parted(base: str, variant: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Split both answers where they part, so that what differs can be marked."""
    pairs = zip(base, variant, strict=False)
    same = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(base), len(variant)))
    return (base[:same], base[same:]), (variant[:same], variant[same:])
