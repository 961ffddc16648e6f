"""What a user hears while a command waits for a registry that fails for a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gemma_pack.commands import run
from gemma_pack.console import Console
from gemma_pack.oci.push import push
from tests.oci.faulty import Fault, Faulty, say

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BUSY = say(503, {"Retry-After": "1"})


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("POST", ["push", "model.oci", "REF"]),
        ("GET", ["pull", "REF", "-o", "pulled"]),
        ("GET", ["verify", "REF"]),
        ("GET", ["inspect", "REF"]),
        ("GET", ["referrers", "REF"]),
        ("GET", ["deploy", "REF", "--target", "kserve", "--allow-unvalidated"]),
    ],
)
def test_a_command_that_waits_says_why_and_for_how_long(
    faulty: Faulty,
    random_layout: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    arguments: list[str],
):
    layout = random_layout(size_bytes=1000)
    push(layout, f"{faulty.host}/team/other:1", reporter=Console("quiet"))
    monkeypatch.chdir(tmp_path)
    reference = f"{faulty.host}/team/{'gemma' if method == 'POST' else 'other'}:1"
    faulty.faults = [Fault(method, "uploads|manifests", BUSY)]
    code = run([reference if argument == "REF" else argument for argument in arguments])
    assert code == (15 if arguments[0] == "verify" else 0)  # weights from random numbers are of use to nobody
    said = [line for line in capsys.readouterr().err.splitlines() if "trying again" in line]
    assert len(said) == 1
    assert said[0].startswith("127.0.0.1 answered 503 to /v2/team/")
    assert said[0].endswith(": trying again in 1 s")


def test_nobody_hears_of_it_with_quiet(
    faulty: Faulty, random_layout: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    faulty.faults = [Fault("POST", "uploads", BUSY)]
    assert run(["push", str(random_layout(size_bytes=1000)), f"{faulty.host}/a/b:1", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
