"""vLLM's server as a process of ours: found, started on a directory, waited for, stopped with all its children.

`serve` shows it to people, `validate --engine vllm` asks it. vLLM lives in an environment of its own, because it pins
another compressed-tensors than llm-compressor does; `GEMMA_PACK_VLLM` names that environment's Python.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma_pack.errors import EngineError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

VARIABLE: Final = "GEMMA_PACK_VLLM"
STOP_SECONDS: Final = 20
POLL_SECONDS: Final = 0.2
LOG_LINES: Final = 30
_ERROR: Final = re.compile(
    r"^(?:\(\S+ pid=\d+\) )?(?:ERROR \S+ \S+ \[\S+\] )?([A-Za-z_][\w.]*(?:Error|Exception): .+)$", re.MULTILINE
)
"""The last line of a traceback, bare or behind the process, time and place that vLLM's logger puts before it."""
REMEDIES: Final = {
    "cpu_gemm_wna16": "vLLM's CPU build has an int4 kernel for processors with AVX-512 alone; fp8-dynamic loads on all",
}
"""What to do about errors of vLLM's that do not say it."""
OFFLINE: Final = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""The model is a directory: nothing is to be asked of a network, and nothing told to one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmServer:
    """A running server.

    Attributes:
        base_url: `http://host:port`, without a path.
        log: what it wrote so far.
        start_seconds: from the start of the process to the first healthy answer.
        process: its first process, the leader of its group.
    """

    base_url: str
    log: Path
    start_seconds: float
    process: subprocess.Popen[bytes]


def find_vllm(environ: Mapping[str, str] = os.environ) -> Path:
    """Return a Python that has vLLM: that of GEMMA_PACK_VLLM, our own, or the one beside a `vllm` on the PATH.

    Raises:
        MachineError: there is none; the hint says how to get one.
    """
    if given := environ.get(VARIABLE):
        found = shutil.which(given, path=environ.get("PATH"))
        if found is None:
            raise MachineError(
                f"{VARIABLE} names {given}, and it is not there",
                hint="set it to the Python of an environment that has vLLM",
            )
        return Path(found)
    if find_spec("vllm"):
        return Path(sys.executable)
    script = shutil.which("vllm", path=environ.get("PATH"))
    beside = Path(script).resolve().with_name("python") if script else None  # pipx and uv link the script alone
    if beside and beside.is_file():
        return beside
    raise MachineError(
        "there is no vLLM here",
        hint="python -m venv vllm && vllm/bin/pip install vllm && "
        f"export {VARIABLE}=$PWD/vllm/bin/python; in a container: gemma-pack deploy REF --target rhaiis",
    )


@contextmanager
def serving(
    python: Path,
    directory: Path,
    arguments: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    log: Path,
    environment: Mapping[str, str] | None = None,
    start_seconds: float | None = None,
) -> Iterator[VllmServer]:
    """Serve the checkpoint in `directory` with the OpenAI API until the block ends.

    The module is started, not the `vllm` script: the script of vLLM's CPU build looks for a distribution named vllm.

    Args:
        python: of an environment that has vLLM.
        directory: holds config, weights and tokenizer.
        arguments: further options of `vllm serve`.
        host: address to listen on.
        port: to listen on; None takes a free one.
        log: file that gets the server's output.
        environment: its variables; None gives it ours, without the network.
        start_seconds: how long it may take until it is healthy; None waits as long as it lives, for Ctrl-C ends that.

    Raises:
        EngineError: it died before it was healthy, or took too long; the message ends with its last lines.
        MachineError: another program has the port.
    """
    started = time.monotonic()
    port = port or free_port()
    _require_free(host, port)
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - a list of arguments, no shell
            [
                str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments,
                f"--model={directory}", f"--host={host}", f"--port={port}",  # last, so that no argument changes them
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment) if environment is not None else {**os.environ, **OFFLINE},
            start_new_session=True,  # a group of its own: Ctrl-C reaches us alone, and we stop all of it in order
        )  # fmt: skip
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared with, not bound
    shown = f"[{shown}]" if ":" in shown else shown
    try:
        base_url = f"{_scheme(arguments)}://{shown}:{port}"
        _wait_until_healthy(process, base_url, log, start_seconds)
        yield VllmServer(base_url=base_url, log=log, start_seconds=time.monotonic() - started, process=process)
    finally:
        stop(process)


def private_environment() -> dict[str, str]:
    """Return variables for a server that talks over 127.0.0.1 alone, to us alone: no proxy, no key, no network."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept.pop("VLLM_API_KEY", None)
    return {**kept, **OFFLINE, "GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end and wait for its whole process group; what does not end in time is killed.

    So is what still runs at a second Ctrl-C.
    """
    try:
        process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while _group_lives(process.pid) and time.monotonic() < deadline:
            process.poll()  # collects the leader's exit code: until then it counts as a member of its group
            time.sleep(0.05)
    finally:
        if _group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_words(log: Path) -> str:
    """Return why a server ended: the first error in its log, which the others follow from; else the log's end."""
    first = _ERROR.search(log.read_text("utf-8", errors="replace"))
    return f" {first[1]}" if first else f"\n{last_lines(log)}"


def last_lines(log: Path) -> str:
    """Return the end of what a server wrote."""
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:])


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _scheme(arguments: Sequence[str]) -> str:
    """Return what the server speaks; vLLM takes underscores for dashes."""
    return "https" if any(one.replace("_", "-").startswith("--ssl-certfile") for one in arguments) else "http"


def _require_free(host: str, port: int) -> None:
    """Refuse a port that another program listens on: its answers would pass for our server's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: one that just ended is no hindrance
        try:
            probe.bind((host, port))
        except OSError as error:
            raise MachineError(
                f"{host} port {port} cannot be listened on: {error.strerror}", hint="choose another with --port"
            ) from error


def _wait_until_healthy(
    process: subprocess.Popen[bytes], base_url: str, log: Path, start_seconds: float | None
) -> None:
    import httpx

    deadline = None if start_seconds is None else time.monotonic() + start_seconds
    while process.poll() is None:
        try:
            answer = httpx.get(
                f"{base_url}/health", timeout=5, trust_env=False,
                verify=False,  # noqa: S501 - our own child, asked for its health alone: any certificate will do
            )  # fmt: skip
            if answer.status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # not listening yet
        if deadline and time.monotonic() > deadline:
            raise EngineError(f"vLLM was not healthy within {start_seconds:.0f} s:\n{last_lines(log)}")
        time.sleep(POLL_SECONDS)
    words = last_words(log)
    otherwise = "options of vLLM's can be passed to gemma-pack serve behind --"
    remedy = next((remedy for error, remedy in REMEDIES.items() if error in words), otherwise)
    raise EngineError(
        f"vLLM ended with exit code {process.returncode} before it was healthy:{words}",
        hint=f"{log} says more; {remedy}",
    )


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
