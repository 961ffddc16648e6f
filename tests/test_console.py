"""The one output sink: what goes where, and what a terminal, a log file and a program get to see."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from pydantic import BaseModel

from gemma_pack import console as console_module
from gemma_pack.console import Console, Format, format_bytes, table
from gemma_pack.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Show = Callable[[Callable[[Console], None]], str]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


class Streams:
    """A console on two strings."""

    def __init__(self, output_format: Format = "human") -> None:
        self.stdout, self.stderr = io.StringIO(), io.StringIO()
        self.console = Console(output_format, stdout=self.stdout, stderr=self.stderr)

    @property
    def out(self) -> str:
        return self.stdout.getvalue()

    @property
    def err(self) -> str:
        return self.stderr.getvalue()


class Size(BaseModel):
    size_bytes: int


def say_everything(console: Console) -> None:
    console.status("reading")
    console.warn("it is large")
    console.result(Size(size_bytes=7), "7 B")
    console.hint("now push it")


def test_only_the_result_is_on_stdout():
    human = Streams()
    say_everything(human.console)
    assert human.out == "7 B\n"
    assert human.err == "reading\nwarning: it is large\nhint: now push it\n"


def test_quiet_leaves_the_result_and_the_warning():
    quiet = Streams("quiet")
    say_everything(quiet.console)
    assert quiet.out == "7 B\n"
    assert quiet.err == "warning: it is large\n"


def test_json_is_one_document_on_stdout_and_one_a_line_on_stderr():
    program = Streams("json")
    say_everything(program.console)
    program.console.error(MachineError("no GPU", hint="use one"))
    assert json.loads(program.out) == {"size_bytes": 7}
    assert [json.loads(line) for line in program.err.splitlines()] == [
        {"warning": "it is large"},
        {"error": {"message": "no GPU", "hint": "use one", "exit_code": 12}},
    ]


def test_json_takes_a_mapping_and_keeps_letters_readable():
    program = Streams("json")
    program.console.result({"name": "größer", "sizes": [Size(size_bytes=7)], "bound": float("inf")}, "unused")
    assert '"größer"' in program.out
    assert json.loads(program.out) == {"name": "größer", "sizes": [{"size_bytes": 7}], "bound": "Infinity"}


def test_an_error_is_a_sentence_and_its_remedy():
    human = Streams()
    human.console.error(MachineError("no GPU", hint="use one"))
    human.console.error(MachineError("no disk"))
    assert human.out == ""
    assert human.err == "error: no GPU\nhint: use one\nerror: no disk\n"


def test_an_error_is_said_even_when_quiet():
    quiet = Streams("quiet")
    quiet.console.error(MachineError("no GPU", hint="use one"))
    assert quiet.err == "error: no GPU\nhint: use one\n"


def test_a_name_from_a_downloaded_file_cannot_steer_the_terminal():
    human = Streams()
    human.console.error(MachineError("no \033]0;owned\007 tensor\r\x9b2J\ntwo lines"))
    human.console.result({}, "\033[2Jcell\tcell")
    assert human.err == "error: no \\u001b]0;owned\\u0007 tensor\\u000d\\u009b2J\ntwo lines\n"
    assert human.out == "\\u001b[2Jcell\tcell\n"
    program = Streams("json")
    program.console.result({"name": "\x9b2J\x7f"}, "unused")
    assert '"\\u009b2J\\u007f"' in program.out
    assert json.loads(program.out) == {"name": "\x9b2J\x7f"}


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": ""}, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": ""}, True),
    ],
)
def test_colour_without_a_terminal(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], coloured: bool):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    human = Streams()
    human.console.error(MachineError("no GPU: none at all"))
    assert human.err == ("\033[31merror:\033[0m no GPU: none at all\n" if coloured else "error: no GPU: none at all\n")


def test_json_is_never_coloured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    program = Streams("json")
    program.console.warn("it is large")
    assert program.err == '{"warning": "it is large"}\n'


def test_plain_progress_is_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 4.0, 10.5, 11.0, 21.0])
    monkeypatch.setattr(console_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    human = Streams()
    with human.console.progress("layers", 4) as task:
        task.advance()
        task.note("loss 0.5")
        task.advance()
        task.advance()
        task.advance()
    assert human.err.splitlines() == [
        "layers: 2/4 (50 %) loss 0.5",
        "layers: 4/4 (100 %) loss 0.5",
        "layers: 4/4 (100 %) loss 0.5",
    ]


def test_plain_progress_counts_bytes_and_bears_an_unknown_total():
    human = Streams()
    with human.console.progress("copy", 4e9, "bytes") as task:
        task.advance(1_500_000_000)
    with human.console.progress("read", None, "bytes") as task:
        task.advance(2048)
    assert human.err.splitlines() == ["copy: 1.50 GB/4.00 GB (38 %)", "read: 2.05 kB"]


def test_plain_progress_of_bytes_says_how_fast_they_move(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 12.0, 12.0, 30.0])
    monkeypatch.setattr(console_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    human = Streams()
    with human.console.progress("copy", 3e9, "bytes") as task:
        task.advance(3_000_000_000)
    assert human.err.splitlines() == [
        "copy: 3.00 GB/3.00 GB (100 %), 250.00 MB/s",
        "copy: 3.00 GB/3.00 GB (100 %), 100.00 MB/s",
    ]


def test_plain_progress_does_not_claim_that_a_failed_step_ended():
    human = Streams()
    with pytest.raises(MachineError), human.console.progress("copy", 4):
        raise MachineError("no disk")
    assert human.err == ""


class SlowAmount(float):
    """One, that takes its time to be added, so that threads meet in the middle of it."""

    def __radd__(self, other: float) -> float:
        time.sleep(0.001)
        return other + 1.0


def test_plain_progress_counts_what_threads_do():
    human = Streams()
    with human.console.progress("copy", 40) as task:
        threads = [threading.Thread(target=lambda: [task.advance(SlowAmount(1)) for _ in range(10)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert human.err == "copy: 40/40 (100 %)\n"


@pytest.mark.parametrize("output_format", ["json", "quiet"])
def test_progress_is_silent_for_programs(output_format: Format):
    streams = Streams(output_format)
    with streams.console.progress("copy", 4) as task:
        task.advance()
        task.note("fast")
    assert (streams.out, streams.err) == ("", "")


@pytest.fixture
def on_terminal() -> Iterator[Show]:
    """Return a function that runs something on a console whose stderr is a terminal, and gives what that showed."""
    ours, theirs = pty.openpty()
    stream = os.fdopen(theirs, "w", encoding="utf-8")

    def show(use: Callable[[Console], None]) -> str:
        pieces: list[bytes] = []
        reader = threading.Thread(target=lambda: _drain(ours, pieces))
        reader.start()
        use(Console(stdout=io.StringIO(), stderr=stream))
        stream.close()
        reader.join(timeout=10)
        return b"".join(pieces).decode()

    yield show
    stream.close()
    os.close(ours)


def _drain(descriptor: int, pieces: list[bytes]) -> None:
    while True:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:  # how Linux says that the other side is closed
            return
        if not piece:
            return
        pieces.append(piece)


def without_control(shown: str) -> str:
    return re.sub(r"\033\[[0-9;?]*[A-Za-z]", "", shown)


def copy_a_little(console: Console) -> None:
    with console.progress("copy [/bold]", 4e6, "bytes") as task:
        task.advance(1e6)
        console.status("a remark")
        task.note("loss 0.5")
        task.advance(3e6)


def test_a_terminal_gets_a_bar(on_terminal: Show):
    shown = on_terminal(copy_a_little)
    last = without_control(shown).rstrip().splitlines()[-1]
    assert "\033[2K" in shown
    assert re.search(r"copy \[/bold\] ━+ 4\.00 MB/4\.00 MB .*loss 0\.5", last), last
    assert len(last.rstrip()) <= 80


def test_what_is_said_stands_above_the_bar(on_terminal: Show):
    lines = without_control(on_terminal(copy_a_little)).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert "a remark" in lines, "the remark has a line to itself"


def test_a_step_inside_a_step_has_its_own_bar_for_as_long_as_it_lasts(on_terminal: Show):
    def use(console: Console) -> None:
        with console.progress("outer", 2) as outer:
            for _ in range(2):
                with console.progress("inner", 1) as inner:
                    inner.advance()
                    console.status("inside")
                outer.advance()

    shown = without_control(on_terminal(use))
    assert re.search(r"outer ━+.*\r?\n.*inner ━+", shown)
    assert re.search(r"outer ━+ 2/2 [^\r\n]*\r\n$", shown), "only the outer bar is left"


def test_a_bar_ends_with_its_step_even_if_it_fails(on_terminal: Show):
    def use(console: Console) -> None:
        with pytest.raises(MachineError), console.progress("copy", 4):
            raise MachineError("no disk")
        console.error(MachineError("no disk"))
        with console.progress("again", 1) as task:
            task.advance()

    shown = on_terminal(use)
    assert "\033[31merror:\033[0m no disk" in shown
    assert "again" in shown


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_no_bar_where_a_terminal_only_pretends(
    on_terminal: Show, monkeypatch: pytest.MonkeyPatch, name: str, value: str
):
    monkeypatch.setenv(name, value)
    assert on_terminal(copy_a_little).splitlines() == ["a remark", "copy [/bold]: 4.00 MB/4.00 MB (100 %) loss 0.5"]


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"TERM": "dumb", "FORCE_COLOR": "1"}, True)],
)
def test_colour_on_a_terminal(
    on_terminal: Show, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], coloured: bool
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ("\033[" in on_terminal(lambda console: console.warn("beware"))) is coloured


@pytest.mark.parametrize(
    ("size_bytes", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_994, "999.99 kB"),
        (999_996, "1.00 MB"),
        (18_500_000_000, "18.50 GB"),
        (-2_000_000, "-2.00 MB"),
    ],
)
def test_sizes_are_decimal(size_bytes: int, written: str):
    assert format_bytes(size_bytes) == written


def test_a_table_puts_numbers_to_the_right_and_words_to_the_left():
    rows = [["variant", "18.48 GB", "-1.5 %", "pass", ""], ["a", "6.10 GB", "", "undecided", ""]]
    assert table(rows, header=["what", "size", "change", "verdict", "note"]).splitlines() == [
        "what         size  change  verdict    note",
        "───────  ────────  ──────  ─────────  ────",
        "variant  18.48 GB  -1.5 %  pass",
        "a         6.10 GB          undecided",
    ]


def test_a_table_without_a_header():
    assert table([["name", "w4a16"], ["digest", "f0cd"]]) == "name    w4a16\ndigest  f0cd"


def test_a_table_of_a_whole_build_fits_80_columns():
    header = ["variant", "bf16", "quantized", ""]
    rows = [["gemma-3-270m-quantized.w4a16", "536.22 MB", "393.41 MB", "already there, same inputs"]]
    assert max(map(len, table(rows, header=header).splitlines())) <= 80


def test_a_table_without_rows():
    assert table([]) == ""
    assert table([], header=["a", "bb"]).splitlines() == ["a  bb", "─  ──"]


def test_a_ragged_table_is_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        table([["a", "b"], ["c"]])


@pytest.mark.parametrize(("terminal", "before"), [(True, "\n"), (False, "")])
def test_an_interruption_stands_below_the_line_where_a_terminal_shows_it(
    terminal: bool, before: str, monkeypatch: pytest.MonkeyPatch
):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    Console(stderr=stream).interrupted(130)
    assert stream.getvalue().startswith(f"{before}interrupted; finished stages are kept")
