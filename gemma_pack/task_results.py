"""What benchmark tasks found, item by item and in sum: parts of report.json that evaluation fills and reports render.

An item is one question that both models answered; the paired figures are over the same items.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict

TASKS_DIRECTORY: Final = "tasks"
"""Beside report.json: the items of each task, a line an item, with both scores."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ItemScores(_Part):
    """What one model scored on each item of a task, by one metric after one of the task's filters."""

    metric: str
    filter: str
    higher_is_better: bool
    shots: int
    scores: dict[str, float]
    """By the item's name: the task's, of a group the member's, and the number of the document."""


class TaskScores(_Part):
    """All that one model scored on a task or a group of tasks."""

    task: str
    limit: int | None = None
    """Items of each task at most; None for all."""
    prompts_sha256: str
    """Of the prompts of all items, so that only answers to the same questions are paired."""
    metrics: tuple[ItemScores, ...]


class TaskResult(_Part):
    """One metric of one task on both models, paired over items."""

    task: str
    label: str
    """The benchmark's name in the suite; else the task's."""
    metric: str
    filter: str
    shots: int
    items: int
    base: float
    variant: float
    """Means over the items."""
    difference: float
    """variant - base."""
    lower: float
    upper: float
    """One-sided 95 % bounds of the difference."""
    recovery_percent: float | None = None
    """100 variant / base, where more is better."""
    gained: int | None = None
    """Items that only the variant got right; None where items are not simply right or wrong."""
    lost: int | None = None
    """Items that only the base got right. Flips are gained and lost together."""
    detectable: float
    """The smallest difference that so many items would have shown, with 80 % probability at the 5 % level."""
    higher_is_better: bool
    published: dict[str, float] = {}
    """What Google's model card states for the bf16 models, by size, in percent."""
    items_file: str
    items_sha256: str


class SkippedTask(_Part):
    """A task of a suite that was not run, and why."""

    label: str
    reason: str


class TaskReport(_Part):
    """What the tasks found."""

    suite: str | None = None
    limit: int | None = None
    harness: str
    """lm-evaluation-harness and its version."""
    results: tuple[TaskResult, ...]
    skipped: tuple[SkippedTask, ...] = ()
