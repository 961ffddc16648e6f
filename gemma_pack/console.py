"""The one output sink: results on stdout, everything else on stderr.

A command hands its result to `Console.result` once, as a pydantic model or a mapping for `--format json` and
as text for people. Long work reports through `Console.progress`: a bar on a terminal, plain lines
every few seconds without one, nothing when quiet. With `--format json` each line of stderr is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from pydantic import BaseModel
    from rich.progress import Progress, Task, TaskID
    from rich.text import Text

    from gemma_pack.errors import GemmaPackError

Format = Literal["human", "json", "quiet"]
Unit = Literal["bytes", "steps"]

_PLAIN_INTERVAL_S = 10.0
"""Without a terminal, one progress line at most this often."""
_CONTROL = {code: f"\\u{code:04x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A name inside a downloaded file must not steer the terminal that shows it; JSON knows these escapes too."""


class ProgressTask(Protocol):
    """One long step under way; threads may share it."""

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


class _SilentTask:
    def advance(self, amount: float = 1) -> None:
        del amount

    def note(self, text: str) -> None:
        del text


@dataclass(slots=True)
class _BarTask:
    bars: Progress
    task: TaskID

    def advance(self, amount: float = 1) -> None:
        self.bars.advance(self.task, amount)

    def note(self, text: str) -> None:
        self.bars.update(self.task, note=text)


@dataclass(slots=True)
class _PlainTask:
    label: str
    total: float | None
    unit: Unit
    stream: TextIO
    last_line_s: float
    done: float = 0
    remark: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    begin_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.begin_s = self.last_line_s

    def advance(self, amount: float = 1) -> None:
        with self.lock:
            self.done += amount
            now = time.monotonic()
            if now - self.last_line_s >= _PLAIN_INTERVAL_S:
                self.last_line_s = now
                self.write()

    def note(self, text: str) -> None:
        self.remark = text

    def write(self) -> None:
        done = _amount(self.done, self.total, self.unit)
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        print(f"{self.label}: {done}{share}{self.rate()} {self.remark}".rstrip(), file=self.stream, flush=True)

    def rate(self) -> str:
        """Write the mean rate so far; nothing for steps, or before a second has passed."""
        elapsed_s = time.monotonic() - self.begin_s if self.unit == "bytes" else 0.0
        return f", {format_bytes(self.done / elapsed_s)}/s" if elapsed_s >= 1 else ""


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
        self._bars: Progress | None = None

    def result(self, data: BaseModel | Mapping[str, Any], text: str) -> None:
        """Print the outcome on stdout: `data` (a pydantic model or a mapping) as JSON, or `text` for people."""
        if self.format == "json":
            text = _as_json(data)
        print(text.translate(_CONTROL), file=self.stdout, flush=True)

    def piece(self, text: str) -> None:
        """Print a piece of an answer on stdout as it comes, without a line end; nothing with `--format json`."""
        if self.format != "json":
            print(text.translate(_CONTROL), end="", file=self.stdout, flush=True)

    def line(self, data: Mapping[str, Any]) -> None:
        """Print one of many results as a line of JSON on stdout; nothing without `--format json`."""
        if self.format == "json":
            print(json.dumps(data, ensure_ascii=False), file=self.stdout, flush=True)

    def status(self, message: str) -> None:
        """Say what happens now, on stderr, for people only."""
        if self.format == "human":
            self._say(message)

    def warn(self, message: str) -> None:
        """Say what the user should know, on stderr, in every format."""
        if self.format == "json":
            self._say_json({"warning": message})
        else:
            self._say(f"warning: {message}", colour="33")

    def hint(self, message: str) -> None:
        """Say what to do next, on stderr, for people only."""
        if self.format == "human":
            self._say(f"hint: {message}", colour="36")

    def error(self, error: GemmaPackError) -> None:
        """Say what failed and the remedy, on stderr; as one JSON object with `--format json`."""
        if self.format == "json":
            self._say_json({"error": {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}})
            return
        self._say(f"error: {error.message}", colour="31")
        if error.hint:
            self._say(f"hint: {error.hint}", colour="36")

    def interrupted(self, exit_code: int) -> None:
        """Say that the user, or a job's timeout, ended the command; as one JSON object with `--format json`."""
        kept = "finished stages are kept, run the same command again to go on"
        if self.format == "json":
            self._say_json({"error": {"message": "interrupted", "hint": kept, "exit_code": exit_code}})
        else:
            if self.format == "human" and self.stderr.isatty():
                print(file=self.stderr)  # ends the line on which the terminal shows ^C
            self.status(f"interrupted; {kept}")

    @contextmanager
    def progress(self, label: str, total: float | None, unit: Unit = "steps") -> Iterator[ProgressTask]:
        """Show progress of one long step until the block ends.

        `total` is in bytes or steps, None when unknown.
        """
        if self.format != "human":
            yield _SilentTask()
        elif self._bars:  # a step inside a step: a terminal has one live display
            bars, inner = self._bars, _add_bar(self._bars, label, total, unit)
            try:
                yield inner
            finally:
                bars.remove_task(inner.task)
        elif self._is_terminal():
            with _bars(self.stderr) as bars:
                self._bars = bars
                try:
                    yield _add_bar(bars, label, total, unit)
                finally:
                    self._bars = None
        else:
            task = _PlainTask(label, total, unit, self.stderr, last_line_s=time.monotonic())
            yield task
            task.write()

    def _is_terminal(self) -> bool:
        return self.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"

    def _coloured(self) -> bool:
        """Honour no-color.org first, then force-color.org, then what the terminal can do."""
        if os.environ.get("NO_COLOR"):
            return False
        return bool(os.environ.get("FORCE_COLOR")) or (self.stderr.isatty() and os.environ.get("TERM") != "dumb")

    def _say(self, line: str, colour: str | None = None) -> None:
        line = line.translate(_CONTROL)
        if colour and self._coloured():
            head, separator, rest = line.partition(": ")
            line = f"\033[{colour}m{head}{separator.rstrip()}\033[0m {rest}"
        if self._bars:
            self._bars.console.out(line, highlight=False)  # above the bars, which stay whole
        else:
            print(line, file=self.stderr, flush=True)

    def _say_json(self, message: Mapping[str, Any]) -> None:
        self._say(json.dumps(message, ensure_ascii=False))


def _as_json(data: BaseModel | Mapping[str, Any]) -> str:
    from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python  # --help need not wait for it

    try:
        return to_json(data, indent=2, inf_nan_mode="strings").decode()  # JSON has no number for infinity
    except PydanticSerializationError:  # a path that is not UTF-8: its odd bytes are written as \udcXX
        return json.dumps(to_jsonable_python(data), indent=2, ensure_ascii=True)


def _bars(stream: TextIO) -> Progress:
    """Build the display of bars for a terminal; rich is imported here because most commands never draw one."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class AmountColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            unit: Unit = task.fields["unit"]
            speed = f" {format_bytes(task.speed)}/s" if unit == "bytes" and task.speed else ""
            return Text(_amount(task.completed, task.total, unit) + speed)

    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),  # as wide as the rest leaves it
        AmountColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
        console=RichConsole(file=stream),
    )


def _add_bar(bars: Progress, label: str, total: float | None, unit: Unit) -> _BarTask:
    return _BarTask(bars, bars.add_task(label, total=total, unit=unit, note=""))


def _amount(done: float, total: float | None, unit: Unit) -> str:
    """Write how much of a step is done, such as `3/18` or `1.20 MB/4.00 MB`."""
    parts = [done] if total is None else [done, total]
    return "/".join(format_bytes(part) if unit == "bytes" else f"{part:.0f}" for part in parts)


def format_bytes(size_bytes: float) -> str:
    """Write a size in decimal units, as registries and disks are sold: 1 GB = 10⁹ bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size_bytes) >= 0.999995 * scale:  # what two decimals round up to 1.00
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None) -> str:
    """Lay out cells in columns two spaces apart: numbers to the right, all else to the left."""
    cells = [*([header] if header else []), *rows]
    columns = []
    for number, column in enumerate(zip(*cells, strict=True)):
        width = max(map(len, column))
        right = any(row[number] for row in rows) and all(_is_amount(row[number]) for row in rows)
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
        if header:
            columns[-1].insert(1, "─" * width)
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _is_amount(cell: str) -> bool:
    """Whether a cell is empty or a number with at most a unit, such as `-1.5 %` or `536.22 MB`."""
    return not cell or cell.lstrip("+-").split(" ")[0].replace(".", "", 1).isdecimal()
