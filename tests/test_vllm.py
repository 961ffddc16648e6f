"""vLLM as a process: found where it is, reported with its log when it dies, and nothing is left running."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gemma_pack.errors import EngineError, MachineError
from gemma_pack.vllm import find_vllm, serving

if TYPE_CHECKING:
    from collections.abc import Callable

FAKE_SERVER = """\
#!{python}
import http.server, os, subprocess, sys
port = next(int(a.partition("=")[2]) for a in sys.argv if a.startswith("--port="))
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print("child", child.pid, flush=True)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a Python of what it is to run instead of vLLM."""

    def make(text: str) -> Path:
        path = tmp_path / "bin" / "python"
        path.parent.mkdir()
        path.write_text(text, "utf-8")
        path.chmod(0o755)
        return path

    return make


def test_a_server_that_dies_says_why(tmp_path: Path, python: Callable[[str], Path]) -> None:
    dying = python(f"#!{sys.executable}\nraise SystemExit('no such model')\n")
    with (
        pytest.raises(EngineError, match=r"exit code 1 before it was healthy:\n(.*\n)*no such model"),
        serving(dying, tmp_path, [], log=tmp_path / "log"),
    ):
        pass


def test_the_first_error_is_the_cause(tmp_path: Path, python: Callable[[str], Path]) -> None:
    """As vLLM 0.32 writes where its CPU build lacks a kernel; what the command line shows last is a consequence."""
    log = (
        "(Worker pid=7) WARNING 11-29 11:11:23 [utils.py:597] Failed to create. Exception: could not\n"
        "(Worker pid=7) ERROR 11-29 11:11:26 [multiproc.py:1063]     raise AttributeError(\n"
        "(Worker pid=7) ERROR 11-29 11:11:26 [multiproc.py:1063] AttributeError: no 'cpu_gemm_wna16'\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    dying = python(f"#!{sys.executable}\nraise SystemExit({log!r})\n")
    with (
        pytest.raises(EngineError, match=r"before it was healthy: AttributeError: no 'cpu_gemm_wna16'$") as raised,
        serving(dying, tmp_path, [], log=tmp_path / "log"),
    ):
        pass
    assert raised.value.hint is not None
    assert str(tmp_path / "log") in raised.value.hint
    assert "AVX-512" in raised.value.hint  # the error alone says nothing to a person


def test_a_server_that_takes_too_long_is_stopped(tmp_path: Path, python: Callable[[str], Path]) -> None:
    idle = python(f"#!{sys.executable}\nimport os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)\n")
    with (
        pytest.raises(EngineError, match=r"was not healthy within 1 s:\npid"),
        serving(idle, tmp_path, [], log=tmp_path / "log", start_seconds=1),
    ):
        pass
    assert not _runs(int((tmp_path / "log").read_text("utf-8").split()[1]))


def test_children_end_with_the_server(
    tmp_path: Path, python: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_pack.vllm.STOP_SECONDS", 1)
    parent = python(FAKE_SERVER.format(python=sys.executable))
    with serving(parent, tmp_path, ["--served-model-name=fake"], log=tmp_path / "log") as server:
        assert server.base_url.startswith("http://127.0.0.1:")
        child = int((tmp_path / "log").read_text("utf-8").split()[1])
        assert _runs(child)
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def test_vllm_is_found_by_its_variable_or_beside_its_script(tmp_path: Path, python: Callable[[str], Path]) -> None:
    path = python("#!/bin/sh\n")
    assert find_vllm({"GEMMA_PACK_VLLM": str(path)}) == path
    with pytest.raises(MachineError, match=r"GEMMA_PACK_VLLM names /nowhere/python, and it is not there"):
        find_vllm({"GEMMA_PACK_VLLM": "/nowhere/python"})
    (path.parent / "vllm").write_text("#!/bin/sh\n")
    (path.parent / "vllm").chmod(0o755)
    assert find_vllm({"PATH": str(path.parent)}) == path
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "vllm").symlink_to(path.parent / "vllm")  # as pipx and uv tool do
    assert find_vllm({"PATH": str(tmp_path / "linked")}) == path
    with pytest.raises(MachineError, match="there is no vLLM here"):
        find_vllm({"PATH": str(tmp_path)})


def _runs(pid: int) -> bool:
    """Whether the process is there and not merely waiting to be reaped."""
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text("utf-8")
    except (ProcessLookupError, FileNotFoundError):
        return False
