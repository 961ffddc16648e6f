from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gemma_pack.commands import run

if TYPE_CHECKING:
    from pytest import CaptureFixture  # noqa: PT013 - a name for annotations only


def test_a_directory_is_checked(tiny_checkpoint: Path, capsys: CaptureFixture[str]):
    assert run(["download", str(tiny_checkpoint)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tiny_checkpoint}: checked, tiny-gemma3_text, ")
    assert captured.out.count("\n") == 1


def test_the_result_as_json(tiny_checkpoint: Path, capsys: CaptureFixture[str]):
    assert run(["download", str(tiny_checkpoint), "--format", "json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["directory"] == str(tiny_checkpoint)
    assert result["fetched"] is False
    assert result["size_bytes"] == sum(path.stat().st_size for path in tiny_checkpoint.iterdir())
    assert result["source"]["kind"] == "directory"
    assert captured.err == ""


def test_what_is_no_model_exits_2(capsys: CaptureFixture[str]):
    assert run(["download", "gemma"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hint: a hub id looks like google/gemma-2-9b-it" in captured.err


def test_offline_exits_14(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CaptureFixture[str]):
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GEMMA_PACK_DOWNLOAD_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    assert run(["download", "google/gemma-2-9b-it", "-o", str(tmp_path / "out"), "--format", "json"]) == 14
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["exit_code"] == 14
    assert "google/gemma-2-9b-it is not on this machine" in error["message"]
    assert not (tmp_path / "out").exists()


def test_help_ends_with_two_real_examples(capsys: CaptureFixture[str]):
    assert run(["download", "--help"]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-3].strip() == "Examples:"
    assert all(line.strip().startswith("gemma-pack download ") for line in lines[-2:])


@pytest.mark.real
def test_the_demo_is_there_already_the_second_time(demo_checkpoint: Path, tmp_path: Path, capsys: CaptureFixture[str]):
    directory = tmp_path / "demo"
    directory.mkdir()
    for path in demo_checkpoint.iterdir():
        (directory / path.name).hardlink_to(path)
    assert run(["download", "demo", "-o", str(directory)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{directory}: already there, google/gemma-3-270m, 7 files, 552.42 MB\n"
    assert "GGUF" in captured.err


@pytest.mark.real
def test_another_thing_in_the_way_exits_2(tmp_path: Path, capsys: CaptureFixture[str]):
    (tmp_path / "taken").write_text("mine")
    assert run(["download", "demo", "-o", str(tmp_path / "taken")]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert Path(tmp_path / "taken").read_text() == "mine"
