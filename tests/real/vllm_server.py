"""vLLM's own server on loopback, for one model directory, started and stopped by the tests.

Three processes import torch one after another, which is most of a start; the flags keep the rest short. Nothing is
asked of a network: the model is a directory, the hub client is offline, and the processes talk over 127.0.0.1.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_SECONDS: Final = 240
STOP_SECONDS: Final = 20
KV_CACHE_BYTES: Final = 1 << 30
MAX_BATCHED_TOKENS: Final = 1024
LOG_LINES: Final = 60


class ServerFailedError(AssertionError):
    """The server did not come up or died; the message ends with its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmServer:
    """A running server.

    Attributes:
        base_url: `http://127.0.0.1:port`, without a path.
        model: what clients call the model.
        log: what it wrote so far.
        start_seconds: from the start of the process to the first healthy answer.
    """

    base_url: str
    model: str
    log: Path
    start_seconds: float

    def complete(self, prompt: str, **settings: Any) -> dict[str, Any]:
        """Return the answer of /v1/completions, greedy unless `settings` say otherwise."""
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": 16, **settings}
        answer = httpx.post(f"{self.base_url}/v1/completions", json=body, timeout=120)
        if answer.status_code != httpx.codes.OK:
            raise ServerFailedError(f"{answer.status_code}: {answer.text}\n{_tail(self.log)}")
        parsed: dict[str, Any] = answer.json()
        return parsed


@contextmanager
def serving(directory: Path, arguments: list[str], *, python: Path, log: Path) -> Iterator[VllmServer]:
    """Serve the checkpoint in `directory` until the block ends.

    Args:
        directory: holds config, weights and tokenizer.
        arguments: of `vllm serve`, as a deployment passes them, `--served-model-name` among them.
        python: of an environment that has vLLM.
        log: file that gets the server's output.

    Raises:
        ServerFailedError: it died or was not healthy in time.
    """
    port = _free_port()
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments, *_arguments(directory, port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=server_environment(python),
            start_new_session=True,  # its own process group, so that its children can be stopped with it
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(process, base_url, log)
        [model] = [argument.partition("=")[2] for argument in arguments if argument.startswith("--served-model-name=")]
        yield VllmServer(base_url=base_url, model=model, log=log, start_seconds=time.monotonic() - started)
    finally:
        _stop(process)


def _arguments(directory: Path, port: int) -> list[str]:
    return [
        f"--model={directory}",
        "--host=127.0.0.1",
        f"--port={port}",
        "--enforce-eager",  # compiling would take minutes
        "--max-num-seqs=2",
        f"--max-num-batched-tokens={MAX_BATCHED_TOKENS}",
    ]


def server_environment(python: Path) -> dict[str, str]:
    """Return variables for a vLLM that asks nothing of a network and keeps what it learns beside its Python."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | {
        "DO_NOT_TRACK": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(
            python.parent.parent / "cache"
        ),  # what vLLM knows of an architecture, for the next start
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_BYTES >> 30),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _wait_until_healthy(process: subprocess.Popen[bytes], base_url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailedError(f"vLLM ended with exit code {process.returncode}\n{_tail(log)}")
        try:
            if httpx.get(f"{base_url}/health", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise ServerFailedError(f"vLLM was not healthy within {START_SECONDS} s\n{_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end and wait for its whole process group; what does not end in time is killed."""
    process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while _group_lives(process.pid) and time.monotonic() < deadline:
        process.poll()  # collects the leader's exit code: until then it counts as a member of its group
        time.sleep(0.1)
    if _group_lives(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _tail(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
