"""Starts vLLM's server for one model directory, in an environment of its own, and stops it with all its processes.

Nothing is asked of a network: the model is a directory, the hub client is offline, the processes talk over 127.0.0.1.
The module is started rather than the `vllm` script, which the CPU build does not have.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx

from gemma_pack.errors import EngineError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator

VARIABLE: Final = "GEMMA_PACK_VLLM"
SERVED_NAME: Final = "model"
START_SECONDS: Final = 900
"""A 27B model from a slow disk takes minutes."""
STOP_SECONDS: Final = 20
LOG_LINES: Final = 5
KV_CACHE_GB: Final = 2
"""On a CPU, where vLLM would take 4 GB: a few windows need far less."""
BATCHED_TOKENS: Final = 1024
"""Of one step: the log-probabilities of so many tokens are held at once, 1.1 GB of a vocabulary of 262,144."""


def vllm_python() -> Path:
    """Return the Python of the environment that has vLLM.

    Raises:
        MachineError: GEMMA_PACK_VLLM does not name one.
    """
    given = os.environ.get(VARIABLE)
    found = shutil.which(given) if given else None
    if found is None:
        reason = f"{VARIABLE} names {given}, and it is not there" if given else f"{VARIABLE} is not set"
        raise MachineError(
            f"--engine vllm needs the Python of an environment that has vLLM: {reason}",
            hint=f"python -m venv vllm && vllm/bin/pip install vllm && export {VARIABLE}=$PWD/vllm/bin/python",
        )
    return Path(found)


@contextmanager
def serving(directory: Path, *, python: Path, max_model_len: int, log: Path) -> Iterator[str]:
    """Serve the checkpoint in `directory` until the block ends; yield the server's address.

    Args:
        directory: holds config, weights and tokenizer.
        python: of an environment that has vLLM.
        max_model_len: the longest sequence, in tokens.
        log: file that gets the server's output.

    Raises:
        EngineError: the server died, or was not healthy in time; the message ends with its last words.
    """
    port = _free_port()
    command = [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={directory.resolve()}",
        f"--served-model-name={SERVED_NAME}",
        "--host=127.0.0.1",
        f"--port={port}",
        "--dtype=bfloat16",
        f"--max-model-len={max_model_len}",
        f"--max-num-batched-tokens={BATCHED_TOKENS}",
        "--max-num-seqs=8",
        "--enforce-eager",  # compiling and capturing graphs would take longer than all that is asked
        "--no-enable-prefix-caching",  # windows share nothing
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - a fixed list; the Python is the user's own
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,  # a process group of its own, so that its children can be stopped with it
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_healthy(process, address, log)
        yield address
    finally:
        _stop(process)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept.pop("VLLM_API_KEY", None)  # on loopback, for a few minutes, under a port that nobody knows
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
        **kept,
        "DO_NOT_TRACK": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise EngineError(
                    f"vLLM ended with exit code {process.returncode}: {_last_words(log)}", hint=f"see {log}"
                )
            try:
                if client.get(f"{address}/health").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.2)
    raise EngineError(f"vLLM was not ready within {START_SECONDS} s: {_last_words(log)}", hint=f"see {log}")


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


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-LOG_LINES:]) or "it said nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
