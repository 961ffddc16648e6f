"""gemma-pack generate: what the model is given to answer."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.commands import generate, run

if TYPE_CHECKING:
    from pathlib import Path


class Plain:
    """A language without a chat template, which shows what it is asked to continue."""

    has_template = False

    def continued(self, text: str) -> list[int]:
        return list(text.encode())

    def conversation(self, turns: list[Any]) -> list[int]:
        raise AssertionError(turns)


def test_the_one_message_of_a_file_is_what_a_base_model_continues(tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": "The opposite of hot is"}]))
    turns = generate._conversation("", None, path)
    ids = generate._ids(Plain(), turns, "", raw=False)  # type: ignore[arg-type]
    assert bytes(ids).decode() == "The opposite of hot is"


@pytest.mark.parametrize("given", [["a prompt"], ["--system", "Be brief."], ["--raw"]])
def test_a_whole_conversation_comes_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    path = tmp_path / "messages.json"
    path.write_text("[]")
    assert run(["generate", str(tmp_path), *given, "--messages", str(path)]) == 2
    assert "--messages is a whole conversation" in capsys.readouterr().err


def test_a_pipe_that_is_not_utf_8_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "open_checkpoint", lambda *_: None)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert run(["generate", str(tmp_path), "x"]) == 2
    assert "what comes through the pipe is not UTF-8" in capsys.readouterr().err


def test_without_stdin_the_prompt_is_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert generate._prompt("x", needed=True) == "x"
