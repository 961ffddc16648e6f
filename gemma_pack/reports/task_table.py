"""What benchmark tasks found, as the cells of a table: the same words in every rendering."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gemma_pack.task_results import TaskReport, TaskResult

HEADER: Final = (
    "task", "metric", "shots", "items", "base", "variant", "difference", "95 % bounds", "recovery", "gained, lost",
    "detectable", "published 9B, 27B",
)  # fmt: skip
SHORT_HEADER: Final = ("task", "items", "base", "variant", "difference from, to", "detectable")


def rows(tasks: TaskReport) -> list[list[str]]:
    """Return the cells below `HEADER`, a row a result."""
    return [
        [
            result.label,
            metric(result),
            str(result.shots),
            str(result.items),
            number(result, result.base),
            number(result, result.variant),
            number(result, result.difference, signed=True),
            bounds(result),
            "" if result.recovery_percent is None else f"{result.recovery_percent:.1f} %",
            "" if result.gained is None else f"{result.gained}, {result.lost}",
            number(result, result.detectable),
            ", ".join(f"{percent:g} %" for percent in result.published.values()),
        ]
        for result in tasks.results
    ]


def short_rows(tasks: TaskReport) -> list[list[str]]:
    """Return the cells below `SHORT_HEADER`, which fit a terminal."""
    return [
        [
            result.label,
            str(result.items),
            number(result, result.base),
            number(result, result.variant),
            bounds(result),
            number(result, result.detectable),
        ]
        for result in tasks.results
    ]


def metric(result: TaskResult) -> str:
    """Return the metric's name, with the filter's where there is one."""
    return result.metric if result.filter == "none" else f"{result.metric} ({result.filter})"


def bounds(result: TaskResult) -> str:
    """Return the one-sided bounds of the difference."""
    return f"{number(result, result.lower, signed=True)} to {number(result, result.upper, signed=True)}"


def number(result: TaskResult, value: float, *, signed: bool = False) -> str:
    """Return a score: a share of right answers in percent, another as it is."""
    if not math.isfinite(value):
        return "unknown"
    sign = "+" if signed else ""
    return f"{value:{sign}.4g}" if result.gained is None else f"{100 * value:{sign}.1f} %"
