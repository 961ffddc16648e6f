"""The conversation at a terminal or a pipe: a prompt with history, lines that go on, and a few commands.

At a terminal the keys are readline's: arrows, Ctrl-R to search the history. Ctrl-C stops the answer or clears the line,
Ctrl-D leaves. A pasted text of several lines is one question; a line that ends with a backslash goes on in the next,
and so does all between two lines of three quotes. From a pipe questions are read the same way, without a prompt.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.chat.conversation import Answer, Conversation, Stop
    from gemma_pack.console import Console

PROMPT: Final = "> "
CONTINUED: Final = ". "
BLOCK: Final = '"""'
HISTORY_LENGTH: Final = 1000
COMMANDS: Final = {
    "!new session": "forget the conversation and begin another",
    "!help": "show this",
    "!exit": "leave, as Ctrl-D does",
}


def converse(conversation: Conversation, console: Console, *, interactive: bool, history: Path | None) -> None:
    """Answer questions from stdin until it ends or !exit.

    Args:
        conversation: what is asked.
        console: gets the pieces of each answer; whole answers, one JSON object a line, with `--format json`.
        interactive: whether a person types: with a prompt and line editing.
        history: file that keeps the questions of earlier sessions, readable to its owner alone; None keeps none.
    """
    if interactive:
        _edit_lines(history)
    while (question := _read(console, interactive=interactive)) is not None:
        command = question.strip()
        if not command:
            continue
        if command == "!exit":
            return
        if command.startswith("!"):
            _obey(command, conversation, console)
        else:
            stopped = _answer(conversation, question, console)
            if interactive:
                _save(history)
            elif stopped == "interrupted":  # a job that is cancelled asks no more
                raise KeyboardInterrupt


def describe(answer: Answer) -> str:
    """Write the figures of an answer in a line."""
    first = f", the first after {answer.first_token_seconds:.1f} s" if answer.first_token_seconds is not None else ""
    rate = f", {answer.tokens_per_second:.1f} a second" if answer.tokens_per_second else ""
    stopped = {"end": "", "length": "; cut at the limit of --max-new-tokens", "interrupted": "; interrupted"}
    return f"{answer.tokens} tokens{first}{rate}{stopped[answer.stopped]}"


def _answer(conversation: Conversation, question: str, console: Console) -> Stop | None:
    """Show the answer; return what ended it, None where the question was refused."""
    pieces = conversation.ask(question)
    try:
        for piece in pieces:
            console.piece(piece)
    except KeyboardInterrupt:  # while a piece was being written
        pieces.close()
    except InvalidUsageError as error:  # of this question; the next may fit
        console.error(error)
        return None
    answer = conversation.reply.answer
    console.piece("\n")
    if answer:
        console.line(asdict(answer))
        console.status(f"({describe(answer)})")
    return answer.stopped if answer else None


def _obey(command: str, conversation: Conversation, console: Console) -> None:
    if command == "!new session":
        conversation.forget()
        console.status("a new session")
        return
    if command != "!help":
        console.warn(f"there is no command {command}")
    for name, meaning in COMMANDS.items():
        console.status(f"{name:14}{meaning}")


def _read(console: Console, *, interactive: bool) -> str | None:
    """Return the next question, of one line or several; None when there are no more."""
    lines: list[str] = []
    in_block = False
    while True:
        prompt = (CONTINUED if lines or in_block else PROMPT) if interactive else ""
        try:
            line = input(prompt)
        except EOFError:
            if interactive:
                console.status("")
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            if not interactive:
                raise
            console.status("\n!exit or Ctrl-D leaves")
            lines, in_block = [], False
            continue
        except UnicodeDecodeError as error:
            raise _not_utf_8() from error
        if any("\ud800" <= letter <= "\udfff" for letter in line):  # how Python keeps bytes that are no letters
            raise _not_utf_8()
        if line.strip() == BLOCK:
            if in_block:
                return "\n".join(lines)
            in_block = True
        elif in_block:
            lines.append(line)
        elif line.endswith("\\"):
            lines.append(line[:-1])
        else:
            return "\n".join([*lines, line])


def _not_utf_8() -> InvalidUsageError:
    return InvalidUsageError("what comes through the pipe is not UTF-8", hint="iconv -t utf-8")


def _edit_lines(history: Path | None) -> None:
    """Turn on line editing, where Python was built with it."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off for its own prompt
        readline.set_history_length(HISTORY_LENGTH)
        if history:
            with contextlib.suppress(OSError):
                readline.read_history_file(history)


def _save(history: Path | None) -> None:
    if history is None:
        return
    with contextlib.suppress(ImportError, OSError):  # a conversation goes on without its history
        import readline

        history.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
        readline.write_history_file(history)


__all__ = ["COMMANDS", "converse", "describe"]
