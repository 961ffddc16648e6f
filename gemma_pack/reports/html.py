"""report.html: one self-contained page, verdict first, that reads on a phone, in the dark and on paper.

It fetches nothing and runs no script; its Content-Security-Policy says so. All text of models and prompts is escaped.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from gemma_pack.report import MINIMUM_WINDOWS
from gemma_pack.reports import charts, task_table, wording
from gemma_pack.reports.markdown import estimates, worst_prompts
from gemma_pack.reports.templating import template

if TYPE_CHECKING:
    from gemma_pack.report import Report

    Pieces = list[tuple[str, bool]]


def render_html(report: Report, name: str) -> str:
    """Return the page about the variant called `name`."""
    divergence = report.divergence
    rows = list(zip(report.metrics, wording.rows(report.metrics), strict=True))
    judged = [
        (metric, cells, charts.gauge(metric, higher_is_better=wording.is_higher_better(metric)))
        for metric, cells in rows
        if metric.verdict != "not judged"
    ]
    most = max((kind.kl_nats for kind in divergence.by_kind), default=0.0) or 1.0
    return template("report.html.j2").render(
        report=report,
        name=name,
        words=wording.VERDICT_WORDS,
        reasons=wording.reasons(report),
        minimum_windows=MINIMUM_WINDOWS,
        header=wording.header(report),
        judged=judged,
        others=[cells[:3] for metric, cells in rows if metric.verdict == "not judged"],
        kinds=[(kind, charts.share(kind.kl_nats / most)) for kind in divergence.by_kind],
        parting=charts.parting(report.parity.prompts, report.parity.limit),
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


def _parted(base: str, variant: str) -> tuple[Pieces, Pieces]:
    """Cut both answers into pieces of whole words, and say of each whether the other answer lacks it there."""
    words = [re.findall(r"\s*\S+\s*|\s+", answer) for answer in (base, variant)]
    pieces: tuple[Pieces, Pieces] = ([], [])
    for kind, *bounds in difflib.SequenceMatcher(None, words[0], words[1], autojunk=False).get_opcodes():
        for side, (begin, end) in enumerate((bounds[:2], bounds[2:])):
            if end > begin:
                pieces[side].append(("".join(words[side][begin:end]), kind != "equal"))
    return pieces
