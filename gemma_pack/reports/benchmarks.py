"""The benchmark table of a model card: base, variant, what lies between them, and how sure that is.

A measure of both sides stands in a record as two metrics, `NAME_base` and `NAME_variant`, and what lies between them as
a third, `NAME_recovery_percent` or `NAME_increase_percent`. They share a row; any other metric has its own.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from gemma_pack.reports import wording

if TYPE_CHECKING:
    from gemma_pack.record import Metric

_PART: Final = re.compile(r"(.+)_(base|variant|recovery_percent|increase_percent)")


def benchmark_header(confidence: float) -> tuple[str, ...]:
    """Return the columns' names; bounds of `confidence` on both sides make a narrower interval."""
    interval = f"{100 * (2 * confidence - 1):g} % interval"
    return ("measure", "base", "variant", "recovery or change", interval, "margin", "verdict")


def benchmark_rows(metrics: tuple[Metric, ...]) -> list[list[str]]:
    """Return the cells of each row, in the order of the record."""
    grouped: dict[str, dict[str, Metric]] = {}
    for metric in metrics:
        match = _PART.fullmatch(metric.name)
        stem, part = match.groups() if match else (metric.name, "")
        kind = part if part in ("base", "variant") else "between"
        grouped.setdefault(stem, {})[kind] = metric
    return [_row(parts) for parts in grouped.values()]


def _row(parts: dict[str, Metric]) -> list[str]:
    base, variant, between = parts.get("base"), parts.get("variant"), parts.get("between")
    named = base or variant or between
    if named is None:
        raise AssertionError("a row without a metric")
    label = wording.label(named)
    if named is not between:  # the row has both sides
        label = re.sub(r" (of the )?(base|variant)$", "", label)
    sides = [wording.value(side) if side else "" for side in (base, variant)]
    if between is None:
        return [label, *sides, "", "", "", ""]
    judged = wording.VERDICT_WORDS[between.verdict]
    return [label, *sides, wording.value(between), wording.interval(between), wording.margin(between), judged]
