"""`gemma-pack pull`: options in, result out, and the exit codes that a CI job acts on."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from gemma_pack.commands import run
from gemma_pack.console import Console
from gemma_pack.oci.push import push

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oci.faulty import Faulty


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GEMMA_PACK_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def pushed(faulty: Faulty, random_layout: Callable[..., Path]) -> str:
    reference = f"{faulty.host}/team/gemma:1"
    push(random_layout(size_bytes=1 << 20), reference, reporter=Console("quiet"))
    return reference


def test_it_says_what_came_and_the_second_time_that_it_is_there(
    pushed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    target = tmp_path / "gemma"
    assert run(["pull", pushed, "-o", str(target)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["downloaded", "kept from before", "written"]
    assert lines[4].startswith(f"{target} written: 9 files in ")
    assert lines[5].startswith(f"from {pushed}, sha256:")
    assert "pulling to gemma: " in captured.err
    assert run(["pull", pushed, "-o", str(target)]) == 0
    assert capsys.readouterr().out.startswith(f"{target} was already there, from sha256:")


def test_json_holds_the_whole_result(pushed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["pull", pushed, "-o", str(tmp_path / "gemma"), "--format", "json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["directory"] == str(tmp_path / "gemma")
    assert result["reference"] == pushed
    assert result["digest"] != result["manifest_digest"]
    assert captured.err == ""


def test_a_place_whose_name_is_not_utf8_is_json_all_the_same(
    pushed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    target = tmp_path / os.fsdecode(b"bad\xff")
    for already_there in (False, True):
        assert run(["pull", pushed, "-o", str(target), "--format", "json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["directory"] == str(target)
        assert result["already_there"] is already_there
    assert (target / "config.json").is_file()


def test_the_place_can_come_from_a_variable(pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEMMA_PACK_PULL_OUTPUT", str(tmp_path / "gemma"))
    assert run(["pull", pushed]) == 0
    assert (tmp_path / "gemma" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--platform", "amd64"], "is not os/architecture"),
        (["--platform", "linux/s390x"], "it is for linux/amd64, linux/arm64"),
    ],
)
def test_a_wrong_platform_is_2(
    pushed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
):
    assert run(["pull", pushed, "-o", str(tmp_path / "gemma"), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_something_in_the_way_is_2(pushed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "gemma").write_text("mine")
    assert run(["pull", pushed, "-o", str(tmp_path / "gemma")]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert (tmp_path / "gemma").read_text() == "mine"


def test_a_missing_image_is_1_and_nobody_there_is_14(faulty: Faulty, tmp_path: Path, free_port: int):
    target = str(tmp_path / "gemma")
    assert run(["pull", f"{faulty.host}/team/other:1", "-o", target]) == 1
    assert run(["pull", f"127.0.0.1:{free_port}/team/other:1", "-o", target]) == 14


def test_a_login_is_wanted_13(
    faulty: Faulty, pushed: str, tmp_path: Path, store_login: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    faulty.login = ("hilbert", "open sesame")
    target = tmp_path / "gemma"
    assert run(["pull", pushed, "-o", str(target)]) == 13
    assert f"podman login {faulty.host}" in capsys.readouterr().err
    store_login(faulty.host)
    assert run(["pull", pushed, "-o", str(target)]) == 0
