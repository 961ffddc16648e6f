"""`gemma-pack serve` with a stand-in for vLLM: what it starts, prints and stops, and what it refuses before."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from gemma_pack.console import Console
from gemma_pack.oci.push import push
from tests.real.vllm_server import descendants, read_result, runs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oci.registry import Registry

VLLM = """\
#!{python}
import http.server, json, os, signal, socket, ssl, subprocess, sys
told = dict(argument.removeprefix("--").partition("=")[::2] for argument in sys.argv[3:])
print(json.dumps({{"module": sys.argv[1:3], "told": told, "offline": os.environ["HF_HUB_OFFLINE"]}}), flush=True)
children = []
def end(*_):
    for child in children:
        child.terminate()
        child.wait()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({status})
        self.end_headers()
    def log_message(self, *args): ...
class Server(http.server.HTTPServer):
    address_family = socket.AF_INET6 if ":" in told["host"] else socket.AF_INET
server = Server((told["host"], int(told["port"])), Healthy)
if "ssl-certfile" in told:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(told["ssl-certfile"])
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture
def vllm(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a Python whose vLLM answers /health with a status."""

    def make(status: int = 200) -> Path:
        path = tmp_path / "python"
        path.write_text(VLLM.format(python=sys.executable, status=status), "utf-8")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def start(tmp_path: Path, free_port: int) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts `gemma-pack serve` on a free port."""

    def serve(*arguments: str, python: Path | None = None) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GEMMA_PACK_")}
        environment = {**kept, "GEMMA_PACK_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
        environment |= {"GEMMA_PACK_VLLM": str(python)} if python else {"PATH": str(tmp_path)}
        command = [sys.executable, "-m", "gemma_pack", "serve", "--port", str(free_port), *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return serve


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Press Ctrl-C; return the exit code and what was said on stderr, and check that nothing still runs."""
    started = descendants(process.pid)
    assert len(started) >= 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert not [pid for pid in started if runs(pid)]
    return process.returncode, errors


@pytest.mark.parametrize("chat", [True, False])
def test_a_directory_is_served_until_ctrl_c(
    raw_checkpoint: Callable[..., Path],
    vllm: Callable[..., Path],
    start: Callable[..., subprocess.Popen[str]],
    free_port: int,
    *,
    chat: bool,
) -> None:
    directory = raw_checkpoint("gemma")
    if not chat:
        (directory / "chat_template.jinja").unlink()
    process = start(str(directory), "--", "--max-model-len=4096", python=vllm())
    assert process.stdout
    assert process.stderr
    log = process.stderr.readline().rstrip("\n").rpartition("its log: ")[2]
    call = shlex.split(process.stdout.readline())
    with open(log, encoding="utf-8") as written:  # noqa: PTH123 - a line of a log that goes on
        started = json.loads(written.readline())
    assert started["module"] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert started["told"] == {
        "model": str(directory), "host": "127.0.0.1", "port": str(free_port), "dtype": "bfloat16",
        "served-model-name": "gemma", "max-model-len": "4096",
    }  # fmt: skip
    assert started["offline"] == "1"
    assert call[:2] == ["curl", f"http://127.0.0.1:{free_port}/v1/{'chat/' if chat else ''}completions"]
    assert json.loads(call[-1])["model"] == "gemma"
    assert "healthy after" in process.stderr.readline()
    code, errors = interrupt(process)
    assert (code, errors) == (0, "stopping\n")
    assert not os.path.exists(log)  # noqa: PTH110 - a string


def test_ctrl_c_ends_the_wait_for_a_server(
    raw_checkpoint: Callable[..., Path], vllm: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(str(raw_checkpoint("gemma")), python=vllm(503))
    assert process.stderr
    log = process.stderr.readline().rstrip("\n").rpartition("its log: ")[2]
    while len(descendants(process.pid)) < 2:
        time.sleep(0.01)
    code, errors = interrupt(process)
    assert code == 130
    assert errors.strip().startswith("interrupted")
    assert not os.path.exists(log)  # noqa: PTH110 - a string


def test_a_second_ctrl_c_kills_what_does_not_end(
    raw_checkpoint: Callable[..., Path], vllm: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    python = vllm()
    python.write_text(python.read_text("utf-8").replace("signal.signal(signal.SIGTERM, end)", DEAF), "utf-8")
    process = start(str(raw_checkpoint("gemma")), python=python)
    assert process.stdout
    assert process.stdout.readline().startswith("curl ")
    started = descendants(process.pid)
    assert len(started) >= 2
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # it waits
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert not [pid for pid in started if runs(pid)]


def test_the_call_of_a_server_with_a_key_sends_it(
    raw_checkpoint: Callable[..., Path],
    vllm: Callable[..., Path],
    start: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    process = start(str(raw_checkpoint("gemma")), python=vllm())
    assert process.stdout
    call = process.stdout.readline()
    assert call.endswith('-H "Authorization: Bearer $VLLM_API_KEY"\n')
    assert "sesame" not in call
    assert interrupt(process)[0] == 0


def test_a_closed_terminal_ends_the_server(
    raw_checkpoint: Callable[..., Path], vllm: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(str(raw_checkpoint("gemma")), python=vllm())
    assert process.stdout
    assert process.stdout.readline().startswith("curl ")
    started = descendants(process.pid)
    assert len(started) >= 2
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert not [pid for pid in started if runs(pid)]


def test_an_address_of_ipv6_is_written_as_urls_have_it(
    raw_checkpoint: Callable[..., Path], vllm: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(str(raw_checkpoint("gemma")), "--host", "::1", python=vllm())
    assert process.stdout
    assert process.stdout.readline().startswith("curl http://[::1]:")
    assert interrupt(process)[0] == 0


def test_a_server_with_a_certificate_is_asked_by_https(
    raw_checkpoint: Callable[..., Path],
    vllm: Callable[..., Path],
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    tool: Callable[[str], str],
) -> None:
    pem = tmp_path / "server.pem"
    subject = ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-newkey", "rsa:2048"]
    subprocess.run([tool("openssl"), "req", "-x509", *subject, "-keyout", pem, "-out", tmp_path / "crt"], check=True)
    pem.write_text(pem.read_text("utf-8") + (tmp_path / "crt").read_text("utf-8"), "utf-8")
    process = start(str(raw_checkpoint("gemma")), "--", f"--ssl-certfile={pem}", python=vllm())
    assert process.stdout
    assert process.stdout.readline().startswith("curl https://127.0.0.1:")
    assert interrupt(process)[0] == 0


DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def test_an_image_is_pulled_once_and_served(
    registry: Registry,
    raw_checkpoint: Callable[..., Path],
    vllm: Callable[..., Path],
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    pushed = push(raw_checkpoint("gemma"), f"{registry.host}/team/poet:1.0", reporter=Console("quiet"))
    places = []
    for _ in range(2):
        process = start(pushed.reference, "--format", "json", python=vllm())
        told = read_result(process)
        assert told
        assert told["model"] == "poet"
        places.append((told["directory"], os.stat(told["directory"]).st_ino))  # noqa: PTH116 - a string
        assert interrupt(process)[0] == 0
    assert places[0] == places[1]
    assert places[0][0] == str(tmp_path / "cache/images" / pushed.digest.replace(":", "-"))


def test_without_vllm_it_says_how_to_get_one(
    raw_checkpoint: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(str(raw_checkpoint("gemma")))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 12
    assert errors.startswith("error: there is no vLLM here\nhint: python -m venv vllm && vllm/bin/pip install vllm")
    assert "export GEMMA_PACK_VLLM=" in errors


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--port=9000", "gemma-pack serve --port PORT"),
        ("--host", "gemma-pack serve --host ADDRESS"),
        ("--served_model_name=x", "gemma-pack serve --name NAME"),
    ],
)
def test_what_is_ours_to_say_is_not_vllms(
    raw_checkpoint: Callable[..., Path], start: Callable[..., subprocess.Popen[str]], option: str, hint: str
) -> None:
    process = start(str(raw_checkpoint("gemma")), "--", "--max-model-len=9", option)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        errors
        == f"error: {option.partition('=')[0].replace('_', '-')} stands behind --, and is ours to say\nhint: {hint}\n"
    )


def test_a_port_that_is_taken_is_refused(
    tmp_path: Path,
    raw_checkpoint: Callable[..., Path],
    vllm: Callable[..., Path],
    start: Callable[..., subprocess.Popen[str]],
    free_port: int,
) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        process = start(str(raw_checkpoint("gemma")), python=vllm())
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 12
    assert output == ""
    assert f"error: 127.0.0.1 port {free_port} cannot be listened on: Address already in use" in errors
    assert "hint: choose another with --port" in errors
    assert not list(tmp_path.glob("gemma-pack-serve-*")), "there was no server, so there is no log"


def test_what_vllm_does_not_load_is_refused_before_it_starts(
    raw_checkpoint: Callable[..., Path], vllm: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    config = {"model_type": "gemma3_text", "quantization_config": {"quant_method": "bitsandbytes"}}
    process = start(str(raw_checkpoint("gemma", files={"config.json": json.dumps(config)})), python=vllm())
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "is in bitsandbytes' format, which vLLM dropped" in errors


def test_a_server_that_fails_leaves_its_log(
    raw_checkpoint: Callable[..., Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    dying = tmp_path / "python"
    dying.write_text(f"#!{sys.executable}\nprint('all of it')\nraise ValueError('no kernel')\n", "utf-8")
    dying.chmod(0o755)
    process = start(str(raw_checkpoint("gemma")), python=dying)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: vLLM ended with exit code 1 before it was healthy: ValueError: no kernel\n" in errors
    [log] = tmp_path.glob("gemma-pack-serve-*/vllm.log")
    assert f"hint: {log} says more" in errors
    assert "all of it" in log.read_text("utf-8")
    assert log.parent.stat().st_mode & 0o077 == 0
