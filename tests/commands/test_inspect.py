"""`gemma-pack inspect` and `gemma-pack verify`: tables within 80 columns, JSON, and exit codes."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from gemma_pack.commands import run
from gemma_pack.console import Console
from gemma_pack.oci.package import package
from tests.oci.gemma_images import image, model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GEMMA_PACK_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name, data in model().items():
        (directory / name).write_bytes(data)
    return package(directory, tmp_path / "model.oci", reporter=Console("quiet")).layout


def test_inspect_says_what_it_is_and_for_whom_it_works(layout: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["inspect", str(layout)]) == 0
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines())) <= 80
    assert "gemma3_text, modelcar, linux/amd64, linux/arm64, " in captured.out
    rows = [line.split("  ")[0] for line in captured.out.splitlines() if "  works" in line]
    assert rows == ["KServe oci://", "KServe oci+native://", "KServe oci+fetch://", "containerd, podman"]
    assert "ilab model download   fails    " in captured.out
    assert "remedy: gemma-pack package --layout artifact" in captured.out
    assert captured.err == ""


def test_long_and_hostile_names_keep_the_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    odd = image(model() | {"x" * 200 + ".safetensors": b"\x1b[31m", "a\x1b[31m.bin": b""})
    assert run(["inspect", str(odd.write(tmp_path / "image"))]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_json_has_everything(layout: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["inspect", str(layout), "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {one["consumer"]: one["verdict"] for one in result["judgements"]}["fetch"] == "works"
    assert {"rule", "severity", "consumers", "message", "remedy"} == set(result["findings"][0])
    assert run(["verify", str(layout), "--full", "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verification"]["hashed_bytes"] == result["verification"]["size_bytes"]
    assert result["compatibility"]["kind"] == "modelcar"


def test_verify_says_that_it_is_whole_and_for_whom(layout: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["verify", str(layout)]) == 0
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines())) <= 80
    assert "blobs of 2 manifests there, each at its size: " in captured.out
    assert "KServe oci://         works" in captured.out


def test_what_is_not_whole_is_1_and_the_consumers_are_left_out(layout: Path, capsys: pytest.CaptureFixture[str]):
    blob = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.unlink()
    assert run(["verify", str(layout), "--format", "json"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["compatibility"] is None
    assert "is missing" in result["verification"]["problems"][0]
    assert "is not whole" in json.loads(captured.err)["error"]["message"]


def test_what_is_whole_and_works_for_nobody_is_15(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = {name: data for name, data in model().items() if name != "tokenizer.json"}
    broken = image(files).write(tmp_path / "image")
    assert run(["verify", str(broken)]) == 15
    captured = capsys.readouterr()
    assert "is whole, and no consumer could use it" in captured.err
    assert captured.out.count("there is no tokenizer") == 6
    assert run(["inspect", str(broken)]) == 0


def test_a_wrong_platform_is_2(layout: Path, capsys: pytest.CaptureFixture[str]):
    for verb in ("inspect", "verify"):
        assert run([verb, str(layout), "--platform", "amd64"]) == 2
        assert "is not os/architecture" in capsys.readouterr().err
        assert run([verb, str(layout), "--platform", "linux/s390x"]) == 2
