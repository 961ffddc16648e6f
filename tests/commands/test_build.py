from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml

from gemma_pack.checkpoint import file_sha256
from gemma_pack.commands import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oci.registry import Registry

RECIPE = """\
name: {name}
summary: for tests
scheme: {scheme}
algorithm: nearest
gate: [{{kl_nats: {margin}}}]
"""
MARGIN_OF_ANYTHING = 100


@pytest.fixture
def write_build(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that writes build.yaml with a data-free recipe for each margin of KL, and goes there."""
    monkeypatch.chdir(tmp_path)

    def write(*margins: float, **parts: object) -> Path:
        names = []
        for number, margin in enumerate(margins):
            path = tmp_path / f"r{number}.yaml"
            path.write_text(RECIPE.format(name=f"r{number}", scheme="W8A16", margin=margin))
            names.append(str(path))
        plan = {
            "model": str(trained),
            "recipes": names,
            "output": "out",
            "validation": {"profile": "quick"},
            **parts,
        }
        path = tmp_path / "build.yaml"
        path.write_text(yaml.safe_dump(plan))
        return path

    return write


def digests(directory: Path) -> dict[str, str]:
    return {str(path): file_sha256(path) for path in sorted(directory.rglob("*")) if path.is_file()}


def test_a_build_makes_a_variant_its_report_and_its_image(
    write_build: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(write_build(MARGIN_OF_ANYTHING))]) == 0
    shown = capsys.readouterr()
    stem = "trained-quantized.r0"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [stem, f"{stem}.oci", f"{stem}.report"]
    assert "PASS" in shown.out
    assert f"out/{stem}.oci@sha256:" in shown.out
    assert f"gemma-pack push out/{stem}.oci" in shown.err
    assert all(len(line) <= 80 for line in shown.out.splitlines()[:8])


def test_the_same_build_again_does_nothing(
    write_build: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["build", str(write_build(MARGIN_OF_ANYTHING)), "--format", "json"]
    assert run(build) == 0
    first, before = capsys.readouterr().out, digests(tmp_path / "out")
    assert run(build) == 0
    assert capsys.readouterr().out == first
    assert digests(tmp_path / "out") == before


def test_another_profile_validates_again_and_packs_the_new_verdict(
    write_build: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(write_build(MARGIN_OF_ANYTHING)), "--format", "json"]) == 0
    [first] = json.loads(capsys.readouterr().out)["variants"]
    path = write_build(MARGIN_OF_ANYTHING, validation={"profile": "quick", "seed": 5})
    assert run(["build", str(path), "--format", "json"]) == 0
    [second] = json.loads(capsys.readouterr().out)["variants"]
    assert second["report"]["protocol"]["text"]["seed"] == 5
    assert second["digest"] != first["digest"]


def test_a_variant_that_fails_its_gate_does_not_stop_the_others(
    write_build: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(write_build(0, MARGIN_OF_ANYTHING)), "--format", "json"]) == 10
    first, second = json.loads(capsys.readouterr().out)["variants"]
    assert first["report"]["verdict"] == "fail"
    assert second["report"]["verdict"] == "pass"


def test_a_push_is_pulled_back_and_compared(
    write_build: Callable[..., Path], registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_build(MARGIN_OF_ANYTHING, push=f"{registry.host}/models/tiny")
    assert run(["build", str(path), "--format", "json"]) == 0
    [variant] = json.loads(capsys.readouterr().out)["variants"]
    assert variant["pinned"] == f"{registry.host}/models/tiny@{variant['digest']}"
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert run(["referrers", variant["pinned"], "--format", "json"]) == 0
    attached = json.loads(capsys.readouterr().out)["referrers"]
    assert [(one["kind"], one["verdict"]) for one in attached] == [
        ("sbom", None), ("provenance", None), ("report", "pass"),
    ]  # fmt: skip
    assert run(["deploy", variant["pinned"], "--target", "vllm"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: demo\nrecipes: []\n", "build.yaml:2: recipes"),
        ("model: demo\nrecipes: [w4a16]\nprofile: quick\n", "build.yaml:3: profile: unknown key"),
        ("model: demo\nrecipes: [w4a16]\nvalidation: {profile: thorough}\n", "build.yaml:3: validation.profile"),
        ("model: [demo\n", "build.yaml:2: not YAML"),
        ("model: demo\nrecipes: [w4a17]\n", "no recipe named w4a17"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build.yaml").write_text(text)
    assert run(["build", "build.yaml"]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err
