"""`gemma-pack push` with what it attaches, and `gemma-pack referrers`, which shows it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from gemma_pack.commands import run
from gemma_pack.oci import referrers
from gemma_pack.oci.signing import SigningKey
from gemma_pack.report import report_directory
from tests.oci.test_signing import pem, public_pem
from tests.reports.reports import write_validation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oci.registry import Registry


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GEMMA_PACK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(referrers, "SETTLE_S", 0.0)


@pytest.fixture
def variant(raw_checkpoint: Callable[..., Path]) -> Path:
    directory = raw_checkpoint("gemma")
    write_validation(directory)
    return directory


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, str]:
    """Return the files of a private and a public key."""
    key = SigningKey(ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "my.key").write_bytes(pem(key.key))
    (tmp_path / "my.pub").write_bytes(public_pem(key))
    return str(tmp_path / "my.key"), str(tmp_path / "my.pub")


def test_push_attaches_and_referrers_says_that_nobody_signed(
    registry: Registry, variant: Path, capsys: pytest.CaptureFixture[str]
):
    reference = f"{registry.host}/team/gemma:1"
    assert run(["push", str(variant), reference]) == 0
    assert "attached: sbom, provenance, report; signed by nobody" in capsys.readouterr().out
    assert run(["referrers", reference]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:-1] for line in lines[2:5]] == [
        ["sbom", "nobody"], ["provenance", "nobody"], ["report", "pass", "nobody"],
    ]  # fmt: skip
    assert lines[-1][0].startswith(f"{registry.host}/team/gemma@sha256:")


def test_signatures_are_checked_and_the_documents_written(
    registry: Registry, variant: Path, keys: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    private, public = keys
    reference = f"{registry.host}/team/gemma:1"
    assert run(["push", str(variant), reference, "--sign-key", private, "--format", "json"]) == 0
    attached = json.loads(capsys.readouterr().out)["attached"]
    assert len({one["signer"] for one in attached}) == 1
    assert run(["referrers", reference]) == 0
    captured = capsys.readouterr()
    assert captured.out.count(", not checked") == 5
    assert max(map(len, captured.out.splitlines()[:-1])) <= 80
    assert "--verify-key" in captured.err
    arguments = ["referrers", reference, "--verify-key", public, "-o", str(tmp_path / "evidence"), "--format", "json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)["referrers"]
    assert {one["signed"] for one in found} == {"verified"}
    assert {one["digest"] for one in found} == {one["digest"] for one in attached}
    written = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "evidence").iterdir())
    assert written == ["model-signature", "provenance", "report", "sbom", "signature"]


def test_an_image_that_is_not_signed_with_the_key_is_an_error(
    registry: Registry, variant: Path, keys: tuple[str, str], capsys: pytest.CaptureFixture[str]
):
    reference = f"{registry.host}/team/gemma:1"
    assert run(["push", str(variant), reference]) == 0
    assert run(["referrers", reference, "--verify-key", keys[1]]) == 1
    captured = capsys.readouterr()
    assert "is a signature of this image by that key" in captured.err
    assert "nobody" in captured.out  # what is there is shown all the same


def test_nothing_is_attached_where_that_is_not_wanted(
    registry: Registry, variant: Path, keys: tuple[str, str], capsys: pytest.CaptureFixture[str]
):
    reference = f"{registry.host}/team/gemma:1"
    assert run(["push", str(variant), reference, "--no-referrers", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["attached"] == []
    assert run(["referrers", reference]) == 0
    assert capsys.readouterr().out.startswith("nothing is attached\n")
    assert run(["push", str(variant), reference, "--no-referrers", "--sign-key", keys[0]]) == 2


@pytest.mark.parametrize(
    ("verdict", "code", "words"),
    [
        ("pass", 0, ""),
        ("fail", 10, "worse than its gate allows"),
        ("undecided", 11, "too small for a verdict"),
        (None, 1, "has no validation report, and nothing was sent"),
    ],
)
def test_a_push_that_wants_a_verdict_sends_nothing_without(
    registry: Registry,
    variant: Path,
    capsys: pytest.CaptureFixture[str],
    verdict: Any,
    code: int,
    words: str,
):
    if verdict:
        write_validation(variant, verdict=verdict)
    else:
        report_directory(variant).rename(variant.with_name("elsewhere"))
    reference = f"{registry.host}/team/gemma:1"
    assert run(["push", str(variant), reference, "--require-verdict"]) == code
    assert words in capsys.readouterr().err
    assert run(["referrers", reference]) == (0 if code == 0 else 1)  # there is no such image


def test_a_key_that_is_none_is_refused_before_anything_is_sent(
    registry: Registry, variant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "my.key").write_text("secret words")
    reference = f"{registry.host}/team/gemma:1"
    assert run(["push", str(variant), reference, "--sign-key", str(tmp_path / "my.key")]) == 2
    captured = capsys.readouterr()
    assert "is no private key in PEM" in captured.err
    assert "secret words" not in captured.err
    assert run(["referrers", reference, "--verify-key", str(tmp_path / "my.key")]) == 2
    assert "is no public key in PEM" in capsys.readouterr().err
