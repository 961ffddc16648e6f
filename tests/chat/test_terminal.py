"""The terminal, through a real pseudo-terminal: keys, history, Ctrl-C; and the same through a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHAT = [sys.executable, str(Path(__file__).with_name("speaking.py"))]
PATIENCE_SECONDS = 60
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Terminal:
    """A program at a pseudo-terminal: what is typed to it, and what it shows."""

    def __init__(self, process: subprocess.Popen[bytes], controller: int) -> None:
        self.process, self.controller, self.shown = process, controller, ""

    def type(self, keys: str) -> None:
        os.write(self.controller, keys.encode())

    def expect(self, text: str) -> str:
        """Read until `text` is shown; return all up to it, and forget it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.shown:
            ready, _, _ = select.select([self.controller], [], [], 0.2)
            if ready:
                try:
                    self.shown += os.read(self.controller, 4096).decode(errors="replace").replace("\r\n", "\n")
                except OSError:  # the program ended
                    pytest.fail(f"it ended without {text!r}: {self.shown!r}")
            elif time.monotonic() > deadline:
                pytest.fail(f"it did not show {text!r}: {self.shown!r}")
        before, found, self.shown = self.shown.partition(text)
        return before + found

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C at the prompt until `text` is shown: Python's readline misses one that comes while it draws."""
        for _ in range(10):
            self.type(CTRL_C)
            ready, _, _ = select.select([self.controller], [], [], 3)
            if ready:
                break
        self.expect(text)

    def end(self) -> int:
        return self.process.wait(timeout=PATIENCE_SECONDS)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Keep the history of the tests in a directory of their own."""
    root = str(Path(__file__).parents[2])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GEMMA_PACK_")}
    return {**kept, "GEMMA_PACK_CACHE": str(tmp_path / "cache"), "PYTHONPATH": root, "TERM": "xterm", "NO_COLOR": "1"}


@pytest.fixture
def chat(gemma2: Path, environment: dict[str, str]) -> Callable[..., contextmanager[Terminal]]:  # type: ignore[valid-type]
    """Return a function that opens a chat at a pseudo-terminal."""

    @contextmanager
    def open_terminal(*options: str) -> Iterator[Terminal]:
        controller, terminal = pty.openpty()
        with subprocess.Popen(
            [*CHAT, str(gemma2), *options],
            stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509 - one line between fork and exec, no threads here
        ) as process:  # fmt: skip
            os.close(terminal)
            try:
                yield Terminal(process, controller)
            finally:
                process.kill()
                os.close(controller)

    return open_terminal


def _take_terminal() -> None:
    """Make stdin the controlling terminal, so that Ctrl-C becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_conversation_at_a_terminal(chat: Callable[..., contextmanager[Terminal]], tmp_path: Path) -> None:  # type: ignore[valid-type]
    with chat() as terminal:
        terminal.expect("!help says what else")
        terminal.expect("> ")
        terminal.type("the weight\r")
        terminal.expect("1:'the weight'\n")
        assert re.search(r"\(\d+ tokens, the first after", terminal.expect("> "))
        # Ctrl-C stops the answer, and the program goes on
        terminal.type("count\r")
        terminal.expect("<5>")
        terminal.type(CTRL_C)
        terminal.expect("; interrupted)")
        terminal.expect("> ")
        # the arrow brings back the last question; Ctrl-C at the prompt clears the line
        terminal.type(UP)
        terminal.expect("count")
        terminal.interrupt("!exit or Ctrl-D leaves")
        terminal.expect("> ")
        # lines that go on, by a backslash, quotes and pasting
        terminal.type("one\\\r")
        terminal.expect(". ")
        terminal.type("two\r")
        terminal.expect(r"3:'one\ntwo'")
        terminal.expect("> ")
        terminal.type('"""\ra\r\rb\r"""\r')
        terminal.expect(r"4:'a\n\nb'")
        terminal.expect("> ")
        terminal.type("\x1b[200~pasted\rlines\x1b[201~\r")
        terminal.expect(r"5:'pasted\nlines'")
        terminal.expect("> ")
        terminal.type("overflow\r")
        terminal.expect("error: 9 tokens do not fit into a context of 8\nhint: begin a new session")
        terminal.expect("> ")
        terminal.type("!new session\ragain\r")
        terminal.expect("a new session\n")
        terminal.expect("1:'again'")
        terminal.type("!what\r")
        terminal.expect("there is no command !what")
        terminal.expect("!exit")
        terminal.expect("> ")
        terminal.type("!exit\r")
        assert terminal.end() == 0
    history = tmp_path / "cache/questions"
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.read_text().splitlines()[:2] == ["the weight", "count"]
    with chat() as terminal:  # the next day
        terminal.expect("> ")
        terminal.type(UP)
        terminal.expect("again")
        terminal.interrupt("> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_through_a_pipe_only_answers_are_on_stdout(gemma2: Path, environment: dict[str, str]) -> None:
    asked = 'the weight\n\n"""\na\nb\n"""\n!new session\nc\\\nd'
    ran = subprocess.run(
        [*CHAT, str(gemma2)], input=asked, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.splitlines() == ["1:'the weight'", r"2:'a\nb'", r"1:'c\nd'"]
    assert "tokens, the first after" in ran.stderr
    assert not (Path(environment["GEMMA_PACK_CACHE"]) / "questions").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cancelled_job_asks_no_more(gemma2: Path, environment: dict[str, str], number: int) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*CHAT, str(gemma2)], stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("count\nthe next\n")
        process.stdin.flush()
        assert process.stdout.read(3) == "<1>"
        process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the next" not in rest
    assert "interrupted; finished stages are kept" in errors


def test_bytes_that_are_no_letters_are_refused(gemma2: Path, environment: dict[str, str]) -> None:
    ran = subprocess.run(
        [*CHAT, str(gemma2)], input=b"caf\xe9\n", env=environment, capture_output=True, check=False, timeout=60
    )
    assert ran.returncode == 2
    assert ran.stderr.decode() == "error: what comes through the pipe is not UTF-8\nhint: iconv -t utf-8\n"


@pytest.mark.parametrize("option", ["--silent", "--quiet"])
def test_silent_is_silent(gemma2: Path, environment: dict[str, str], option: str) -> None:
    command = [*CHAT, str(gemma2), option]
    ran = subprocess.run(
        command, input="a\n!exit\nb\n", env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert (ran.stdout, ran.stderr) == ("1:'a'\n", "")


def test_json_is_a_line_an_answer(gemma2: Path, environment: dict[str, str]) -> None:
    command = [*CHAT, str(gemma2), "--format", "json"]
    ran = subprocess.run(
        command, input="a\nb\n", env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    first, second = (json.loads(line) for line in ran.stdout.splitlines())
    assert (first["text"], first["stopped"], second["text"]) == ("1:'a'", "end", "2:'b'")
    assert ran.stderr == ""


def test_a_system_message_that_the_model_does_not_take_is_refused_before_it_is_loaded(
    gemma2: Path, environment: dict[str, str]
) -> None:
    command = [*CHAT, str(gemma2), "--system", "Be brief."]
    ran = subprocess.run(command, input="", env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: Gemma 2 has no system role")
