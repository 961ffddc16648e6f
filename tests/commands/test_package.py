"""`gemma-pack package`: options in, table or JSON out, the right exit code, and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.commands import run
from gemma_pack.oci.layout import Layout
from gemma_pack.oci.package import PackageResult

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GEMMA_PACK_") or name == "SOURCE_DATE_EPOCH"]:
        monkeypatch.delenv(name)


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run(["package", *map(str, arguments), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_layout_lies_beside_the_directory(
    raw_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = raw_checkpoint()
    monkeypatch.chdir(directory.parent)
    assert run(["package", "model"]) == 0
    captured = capsys.readouterr()
    digest = Layout.open(Path("model.oci")).root.digest
    lines = captured.out.splitlines()
    assert lines[0].split() == ["layer", "size", "digest"]
    assert [line.split()[0] for line in lines[2:7]] == [
        "tokenizer",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "configuration",
        "documents",
    ]
    assert lines[7].startswith("the image, with its base")
    assert lines[-2:] == ["model.oci written: linux/amd64, linux/arm64", digest]
    assert max(map(len, lines)) <= 80
    assert "hint: gemma-pack push model.oci REGISTRY/NAME:TAG" in captured.err
    assert run(["package", "model/"]) == 0
    assert "model.oci was already there" in capsys.readouterr().out
    monkeypatch.chdir(directory)
    assert run(["package", "."]) == 0
    assert "model.oci was already there" in capsys.readouterr().out


def test_the_command_that_comes_next_can_be_copied_whatever_the_name(
    raw_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = raw_checkpoint("my model")
    monkeypatch.chdir(directory.parent)
    assert run(["package", "my model"]) == 0
    assert "hint: gemma-pack push 'my model.oci' REGISTRY/NAME:TAG" in capsys.readouterr().err


def test_json_is_the_result_and_nothing_else(
    raw_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = as_json(capsys, raw_checkpoint(), "-o", tmp_path / "x.oci")
    result = PackageResult.model_validate(report)
    assert result.layout == tmp_path / "x.oci"
    assert result.digest == Layout.open(result.layout).root.digest
    assert result.base == "embedded"
    assert result.layers[1].files == ("models/model-00001-of-00002.safetensors",)


def test_both_are_written_beside_each_other_and_pushed_under_two_tags(
    raw_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(raw_checkpoint().parent)
    assert run(["package", "model", "--layout", "both"]) == 0
    captured = capsys.readouterr()
    assert "model.oci written: linux/amd64, linux/arm64\nsha256:" in captured.out
    assert "model.artifact.oci written\nsha256:" in captured.out
    assert "hint: gemma-pack push model.oci REGISTRY/NAME:TAG\n" in captured.err
    assert "hint: gemma-pack push model.artifact.oci REGISTRY/NAME:TAG-artifact\n" in captured.err
    report = as_json(capsys, "model", "--layout", "both", "-o", "other.oci")
    assert {kind: report[kind]["layout"] for kind in report} == {
        "modelcar": "other.oci", "artifact": "other.artifact.oci",
    }  # fmt: skip
    for kind, layout in (("modelcar", "model.oci"), ("artifact", "model.artifact.oci")):
        assert report[kind]["digest"] == Layout.open(Path(layout)).root.digest
        assert as_json(capsys, "model", "--layout", kind)["already_there"]


def test_platforms_and_base_are_taken_from_options_or_variables(
    raw_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = raw_checkpoint()
    one = as_json(capsys, directory, "-o", tmp_path / "1", "--platform", "linux/arm64", "--platform", "linux/arm64")
    assert one["platforms"] == ["linux/arm64"]
    monkeypatch.setenv("GEMMA_PACK_PACKAGE_PLATFORM", "linux/s390x linux/ppc64le")
    monkeypatch.setenv("GEMMA_PACK_PACKAGE_BASE", "none")
    two = as_json(capsys, directory, "-o", tmp_path / "2")
    assert (two["platforms"], two["base"]) == (["linux/s390x", "linux/ppc64le"], "none")
    assert one["layers"] == two["layers"]


def test_an_image_without_a_base_comes_with_a_warning(
    raw_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = raw_checkpoint()
    assert run(["package", str(directory), "--base", "none", "--quiet"]) == 0
    assert "not as oci://" in capsys.readouterr().err
    assert run(["package", str(directory), "-o", str(directory) + ".2"]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "nowhere is not a directory"),
        (["model", "--platform", "amd64"], 2, "'amd64' is not os/architecture"),
        (["model", "--platform", "linux/s390x"], 2, "has no linux/s390x"),
        (["model", "--base", "ubi9"], 2, "ubi9 is no OCI layout"),
        (["model", "-o", "model/inside"], 2, "inside"),
        (["model", "-o", "taken"], 2, "taken is in the way"),
        (["broken"], 1, "model-00001-of-00002.safetensors is truncated"),
        (["bare"], 1, "has no tokenizer"),
        ([], 2, "Missing argument"),
    ],
)
def test_what_cannot_be_done_gets_one_sentence_and_its_exit_code(
    raw_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    raw_checkpoint("model")
    shard = raw_checkpoint("broken") / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (raw_checkpoint("bare") / "tokenizer.json").unlink()
    Path("taken").write_text("mine")
    before = sorted(tmp_path.iterdir())
    assert run(["package", *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    assert sorted(tmp_path.iterdir()) == before


def test_it_works_where_torch_is_not_installed(raw_checkpoint: Callable[..., Path]) -> None:
    program = """
import sys
for name in ("torch", "transformers", "numpy", "llmcompressor", "compressed_tensors"):
    sys.modules[name] = None  # importing it raises ImportError
from gemma_pack.commands import run
sys.exit(run(sys.argv[1:]))
"""
    arguments = [sys.executable, "-c", program, "package", str(raw_checkpoint()), "--quiet"]
    subprocess.run(arguments, check=True, timeout=60, capture_output=True)


def test_help_ends_with_two_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["package", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if line.strip().startswith("gemma-pack package ")]) == 2
