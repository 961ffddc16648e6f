"""`gemma-pack doctor`: findings for people and for programs, exit codes, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gemma_pack import doctor
from gemma_pack.commands import run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def auth_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    return tmp_path / "auth.json"


def test_people_get_a_line_a_finding_and_a_line_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("✓ Python ")
    assert any(line.startswith("! registries ") for line in lines)
    assert any(line.strip() == "→ podman login HOST, or docker login HOST" for line in lines)
    assert captured.err == ""
    assert [line for line in lines if len(line) > 80 and len(line.split()) > 1] == []


def test_programs_get_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--format", "json"]) == 0
    findings = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["disk"]["state"] == "ok"
    assert set(findings["registries"]) == {"subject", "state", "text", "remedy"}


def test_logins_are_named_without_their_secrets(auth_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "aGlsYmVydDpvcGVuIHNlc2FtZQ=="
    auths = {"quay.io": {"auth": secret}, "https://index.docker.io/v1/": {}}
    auth_file.write_text(json.dumps({"auths": auths, "credHelpers": {"ghcr.io": "x"}}), "utf-8")
    assert run(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "logins for docker.io, ghcr.io, quay.io" in " ".join(output.split())
    assert secret not in output


def test_a_broken_file_of_logins_is_a_finding(auth_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auth_file.write_text("{", "utf-8")
    assert run(["doctor"]) == 0
    assert f"{auth_file} is not JSON" in " ".join(capsys.readouterr().out.split())


def test_a_broken_installation_exits_12_after_saying_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["click<1"])
    assert run(["doctor"]) == 12
    captured = capsys.readouterr()
    assert "✗ click" in captured.out
    assert "disk" in captured.out
    assert "cannot work here as it is: click" in captured.err


def test_it_works_without_torch(auth_file: Path) -> None:
    del auth_file
    code = (
        "import sys; sys.modules['torch'] = None; from gemma_pack.commands import run; code = run(['doctor', '-q']); "
        "sys.exit(code or any(name in sys.modules for name in ('transformers', 'llmcompressor')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60).returncode == 0
