"""Validating an image: pulled by digest, checked, judged, and the report attached to the digest, in a real registry."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from gemma_pack.acceptance import default_report_directory, is_image, is_reference
from gemma_pack.build import CalibrationChoice, quantize_model
from gemma_pack.commands import run
from gemma_pack.console import Console
from gemma_pack.evaluation import profiles
from gemma_pack.evaluation.profiles import Profile
from gemma_pack.oci import referrers
from gemma_pack.oci.signing import SigningKey
from gemma_pack.report import read_report
from tests.evaluation.conftest import RECIPE
from tests.oci.test_signing import pem, public_pem

if TYPE_CHECKING:
    from pathlib import Path

    from tests.oci.registry import Registry


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(referrers, "SETTLE_S", 0.0)
    monkeypatch.setitem(profiles.PROFILES, "smoke", Profile("smoke", 36, 48, 2, 4))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def variant(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    (directory / "tiny.yaml").write_text(RECIPE)
    target = directory / "trained-quantized.w8a16"
    quantize_model(
        str(trained), str(directory / "tiny.yaml"), target, CalibrationChoice(), device="cpu", reporter=Console("quiet")
    )
    return target


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, str]:
    """Return the files of a private and a public key."""
    key = SigningKey(ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "my.key").write_bytes(pem(key.key))
    (tmp_path / "my.pub").write_bytes(public_pem(key))
    return str(tmp_path / "my.key"), str(tmp_path / "my.pub")


def validate(image: str, trained: Path, *more: str) -> int:
    return run(["validate", image, "--against", str(trained), "--profile", "smoke", "--device", "cpu", *more])


def test_an_image_is_judged_by_digest_and_the_report_attached_to_it(
    registry: Registry,
    variant: Path,
    trained: Path,
    keys: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    private, public = keys
    reference = f"{registry.host}/team/gemma:1"
    assert run(["push", str(variant), reference, "--sign-key", private]) == 0
    before = {path: path.read_bytes() for path in variant.iterdir()}
    capsys.readouterr()
    assert validate(reference, trained, "--verify-key", public, "--sign-key", private) == 0
    out = capsys.readouterr().out
    assert f"{registry.host}/team/gemma@sha256:" in out
    assert ", signed by key " in out
    assert "attached: the report, sha256:" in out
    assert "PASS: gemma.1.report/report.html" in out
    report = read_report(tmp_path / "gemma.1.report")
    assert run(["referrers", reference, "--verify-key", public, "-o", "evidence", "--format", "json"]) == 0
    found = [one for one in json.loads(capsys.readouterr().out)["referrers"] if one["kind"] == "report"]
    assert [(one["verdict"], one["signed"]) for one in found] == [("pass", "verified")]
    assert report.subject.files == read_report(tmp_path / "gemma.1.report").subject.files
    assert {path: path.read_bytes() for path in variant.iterdir()} == before
    [place] = (tmp_path / "cache" / "images").iterdir()
    cached = json.loads((place / "checkpoint" / "gemma-pack.json").read_text())
    assert "validation" not in cached  # what judges writes into a copy
    assert sorted(path.name for path in place.glob("[!.]*")) == ["checkpoint", "files.json"]


def test_a_cached_image_is_not_fetched_again_and_a_changed_one_is(
    registry: Registry, variant: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    reference = f"{registry.host}/team/gemma:1"
    assert run(["push", str(variant), reference, "--no-referrers"]) == 0
    capsys.readouterr()
    assert validate(reference, trained, "--no-attach", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "pass"
    [place] = (tmp_path / "cache" / "images").iterdir()
    weights = next((place / "checkpoint").glob("*.safetensors"))
    inode, content = weights.stat().st_ino, weights.read_bytes()
    assert validate(reference, trained, "--no-attach") == 0
    assert "signed by nobody" in capsys.readouterr().out
    assert weights.stat().st_ino == inode
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert validate(reference, trained, "--no-attach") == 0
    assert weights.read_bytes() == content
    assert run(["referrers", reference, "--format", "json"]) == 0
    capsys.readouterr()


def test_an_image_that_nobody_trusted_signed_is_refused_before_it_is_fetched(
    registry: Registry,
    variant: Path,
    trained: Path,
    keys: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    reference = f"{registry.host}/team/gemma:1"
    assert run(["push", str(variant), reference]) == 0
    assert validate(reference, trained, "--verify-key", keys[1]) == 1
    assert "is a signature of this image by that key" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_failed_gate_is_attached_too(
    registry: Registry, variant: Path, trained: Path, capsys: pytest.CaptureFixture[str]
):
    reference = f"{registry.host}/team/gemma:1"
    assert run(["push", str(variant), reference]) == 0
    assert validate(reference, trained, "--gate", "kl_nats=0") == 10
    assert run(["referrers", reference]) == 0
    assert "fail" in capsys.readouterr().out


def test_a_layout_is_judged_and_nothing_is_attached(
    variant: Path, trained: Path, keys: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    layout = tmp_path / "gemma.oci"
    assert run(["package", str(variant), "-o", str(layout)]) == 0
    assert validate(str(layout), trained) == 0
    out = capsys.readouterr().out
    assert f"{layout}@sha256:" in out
    assert "attached" not in out
    assert (tmp_path / "gemma.report" / "report.html").is_file()
    assert validate(str(layout), trained, "--verify-key", keys[1]) == 2
    assert "a layout has none" in capsys.readouterr().err


def test_an_image_of_something_else_has_no_gate(registry: Registry, trained: Path, capsys: pytest.CaptureFixture[str]):
    reference = f"{registry.host}/team/base:1"
    assert run(["push", str(trained), reference, "--no-referrers"]) == 0
    assert validate(reference, trained) == 1
    assert "has no record of how it was made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quay.io/team/gemma:w4a16", True),
        ("localhost:5000/team/gemma", True),
        ("localhost/team/gemma", True),
        ("team/gemma", False),
        ("./team.d/gemma", False),
        ("../models.v2/gemma", False),
        ("gemma-quantized.w4a16", False),
    ],
)
def test_references_are_told_from_paths(text: str, expected: bool):
    assert is_reference(text) == expected
    assert is_image(text) == expected


def test_reports_on_images_have_a_name_of_their_own():
    assert str(default_report_directory("quay.io/team/gemma:w4a16")) == "gemma.w4a16.report"
    assert str(default_report_directory(f"quay.io/team/gemma@sha256:{'a' * 64}")) == f"gemma.{'a' * 12}.report"
