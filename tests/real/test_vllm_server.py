"""The fixture that starts servers: what dies is reported with its log, and nothing is left running."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.real.vllm_server import ServerFailedError, serving

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


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!{sys.executable}\nraise SystemExit('no such model')\n", "utf-8")
    python.chmod(0o755)
    with (
        pytest.raises(ServerFailedError, match=r"exit code 1\n(.*\n)*no such model"),
        serving(tmp_path, [], python=python, log=tmp_path / "log"),
    ):
        pass


def test_children_end_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.real.vllm_server.STOP_SECONDS", 1)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(FAKE_SERVER.format(python=sys.executable), "utf-8")
    python.chmod(0o755)
    with serving(tmp_path, ["--served-model-name=fake"], python=python, log=tmp_path / "log") as server:
        assert server.model == "fake"
        child = int((tmp_path / "log").read_text("utf-8").split()[1])
        assert _runs(child)
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    """Whether the process is there and not merely waiting to be reaped."""
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text("utf-8")
    except (ProcessLookupError, FileNotFoundError):
        return False
