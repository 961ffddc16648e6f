"""The one output sink: results on stdout, everything else on stderr.

A command hands its result to `Console.result` once, as a pydantic model or a mapping for `--format json` and
as text for people. Long work reports through `Console.progress`: a bar on a terminal, plain lines
every few seconds without one, nothing when quiet.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from rich.progress import Progress, TaskID

    from gemma_pack.errors import GemmaPackError

Format = Literal["human", "json", "quiet"]
Unit = Literal["bytes", "steps"]

_PLAIN_INTERVAL_S = 10.0
"""Without a terminal, one progress line at most this often."""


class ProgressTask(Protocol):
    """One long step under way."""

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more bytes or steps as done."""

    def note(self, text: str) -> None:
        """Show a short remark, such as the falling loss, beside the bar."""


class Reporter(Protocol):
    """What a stage may say while it works; `Console` is one, tests may pass their own."""

    def status(self, message: str) -> None:
        """Say what happens now, on stderr."""

    def warn(self, message: str) -> None:
        """Say what the user should know, on stderr."""

    def progress(self, label: str, total: float | None, unit: Unit = "steps") -> AbstractContextManager[ProgressTask]:
        """Show progress of one long step until the block ends."""


@dataclass(slots=True)
class _SilentTask:
    def advance(self, amount: float = 1) -> None:
        del amount

    def note(self, text: str) -> None:
        del text


@dataclass(slots=True)
class _BarTask:
    progress: Progress
    task: TaskID
    live: bool = True

    def advance(self, amount: float = 1) -> None:
        self.progress.advance(self.task, amount)

    def note(self, text: str) -> None:
        self.progress.update(self.task, note=text)


@dataclass(slots=True)
class _PlainTask:
    label: str
    total: float | None
    unit: Unit
    stream: TextIO
    done: float = 0
    remark: str = ""
    last_line_s: float = 0.0

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last_line_s >= _PLAIN_INTERVAL_S:
            self.last_line_s = now
            self.write()

    def note(self, text: str) -> None:
        self.remark = text

    def write(self) -> None:
        done = format_bytes(self.done) if self.unit == "bytes" else f"{self.done:.0f}"
        if self.total:
            total = format_bytes(self.total) if self.unit == "bytes" else f"{self.total:.0f}"
            done = f"{done}/{total} ({100 * self.done / self.total:.0f} %)"
        print(f"{self.label}: {done} {self.remark}".rstrip(), file=self.stream, flush=True)


class Console:
    """Writes for a person, for a program (`json`) or nearly nothing (`quiet`)."""

    def __init__(
        self,
        output_format: Format = "human",
        *,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        """Take the streams as they are now, so that a test runner's replacements are honoured."""
        self.format: Format = output_format
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr

    def result(self, data: Mapping[str, Any] | Any, text: str) -> None:  # noqa: ANN401 - any pydantic model
        """Print the outcome on stdout: `data` (a pydantic model or a mapping) as JSON, or `text` for people."""
        if self.format == "json":
            dumped = data.model_dump(mode="json") if hasattr(data, "model_dump") else data
            text = json.dumps(dumped, indent=2, ensure_ascii=False)
        print(text, file=self.stdout, flush=True)

    def status(self, message: str) -> None:
        """Say what happens now, on stderr, for people only."""
        if self.format == "human":
            self._say(message)

    def warn(self, message: str) -> None:
        """Say what the user should know, on stderr, in every format."""
        self._say(f"warning: {message}", colour="33")

    def hint(self, message: str) -> None:
        """Say what to do next, on stderr, for people only."""
        if self.format == "human":
            self._say(f"hint: {message}", colour="36")

    def error(self, error: GemmaPackError) -> None:
        """Say what failed and the remedy, on stderr; as one JSON object with `--format json`."""
        if self.format == "json":
            report = {"error": {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}}
            self._say(json.dumps(report, ensure_ascii=False))
            return
        self._say(f"error: {error.message}", colour="31")
        if error.hint:
            self._say(f"hint: {error.hint}", colour="36")

    @contextmanager
    def progress(self, label: str, total: float | None, unit: Unit = "steps") -> Iterator[ProgressTask]:
        """Show progress of one long step until the block ends.

        `total` is in bytes or steps, None when unknown.
        """
        if self.format != "human":
            yield _SilentTask()
        elif self._is_terminal():
            with _bar(self.stderr, unit) as progress:
                yield _BarTask(progress, progress.add_task(label, total=total, note=""))
        else:
            task = _PlainTask(label, total, unit, self.stderr, last_line_s=time.monotonic())
            yield task
            task.write()

    def _is_terminal(self) -> bool:
        return self.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"

    def _say(self, line: str, colour: str | None = None) -> None:
        coloured = (self.stderr.isatty() and not os.environ.get("NO_COLOR")) or bool(os.environ.get("FORCE_COLOR"))
        if colour and coloured and self.format == "human":
            head, separator, rest = line.partition(": ")
            line = f"\033[{colour}m{head}{separator.rstrip()}\033[0m {rest}"
        print(line, file=self.stderr, flush=True)


def _bar(stream: TextIO, unit: Unit) -> Progress:
    """Build the bar for a terminal; rich is imported here because most commands never draw one."""
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        *amount,
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=RichConsole(file=stream),
        expand=False,
    )


def format_bytes(size_bytes: float) -> str:
    """Write a size in decimal units, as registries and disks are sold: 1 GB = 10⁹ bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None) -> str:
    """Lay out cells in columns two spaces apart: the first column to the left, the others to the right."""
    cells = [list(header), *map(list, rows)] if header else list(map(list, rows))
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    ]
    if header:
        lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)
