"""index.html: one self-contained page over all variants of a build, with a link to the report of each.

Like report.html it fetches nothing and runs no script. The links are relative, so that the directory can be moved,
zipped or served as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from gemma_pack.disk import write_atomic
from gemma_pack.outcome import worst
from gemma_pack.report import report_directory
from gemma_pack.reports import charts, wording
from gemma_pack.reports.templating import template
from gemma_pack.reports.writing import HTML_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gemma_pack.outcome import BuiltImage, StageFailure, VariantOutcome
    from gemma_pack.report import Report

INDEX_NAME: Final = "index.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    recipe: str
    word: str
    href: str | None
    size_bytes: int | None
    share: float | None
    report: Report | None
    reasons: Sequence[str]
    images: Sequence[BuiltImage]
    failure: StageFailure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    size_bytes: int
    perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    name: str
    base: _Base | None
    rows: Sequence[_Row]
    picture: str


def write_index(path: Path, outcomes: tuple[VariantOutcome, ...]) -> None:
    """Write the page over `outcomes`, of which there is at least one, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render_index(outcomes, path.parent))


def render_index(outcomes: tuple[VariantOutcome, ...], directory: Path) -> str:
    """Return the page that will lie in `directory`."""
    models = [
        _model(name, [one for one in outcomes if one.model == name], directory)
        for name in dict.fromkeys(one.model for one in outcomes)
    ]
    passed = sum(one.word == "pass" for one in outcomes)
    return template("index.html.j2").render(
        word=worst(outcomes).word,
        words=wording.OUTCOME_WORDS,
        summary=f"{passed} of {len(outcomes)} variants passed",
        models=models,
    )


def _model(name: str, outcomes: Sequence[VariantOutcome], directory: Path) -> _Model:
    rows = [_row(one, directory) for one in outcomes]
    points = [
        (row.recipe, row.share, row.report.divergence.kl_nats.value, row.word)
        for row in rows
        if row.share and row.report
    ]
    bases = [
        _Base(size_bytes=one.base_size_bytes, perplexity=one.report.likelihood.ppl_base)
        for one in outcomes
        if one.report and one.base_size_bytes
    ]
    return _Model(
        name=name,
        base=bases[0] if bases else None,
        rows=rows,
        picture=charts.tradeoff(points) if len(points) > 1 else "",
    )


def _row(outcome: VariantOutcome, directory: Path) -> _Row:
    page = report_directory(outcome.directory) / HTML_NAME
    return _Row(
        recipe=outcome.recipe,
        word=outcome.word,
        href=quote(os.path.relpath(page, directory)) if outcome.report else None,
        size_bytes=outcome.size_bytes,
        share=outcome.share,
        report=outcome.report,
        reasons=wording.reasons(outcome.report) if outcome.report else (),
        images=outcome.images,
        failure=outcome.failure,
    )
