"""`gemma-pack serve` on loopback with vLLM's CPU build, for one model directory, as the tests ask it.

Three processes import torch one after another, which is most of a start; the flags keep the rest short.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from gemma_pack import vllm

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS: Final = 240
STOP_SECONDS: Final = 60
KV_CACHE_GB: Final = 1
MAX_BATCHED_TOKENS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedServer:
    """A running server.

    Attributes:
        base_url: `http://127.0.0.1:port`, without a path.
        model: what clients call the model.
        log: what vLLM wrote so far.
        call: the line for a shell that was printed when it was healthy.
        process: that of gemma-pack.
    """

    base_url: str
    model: str
    log: Path
    call: str
    process: subprocess.Popen[str]

    def complete(self, prompt: str, **settings: Any) -> dict[str, Any]:
        """Return the answer of /v1/completions, greedy unless `settings` say otherwise."""
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": 16, **settings}
        answer = httpx.post(f"{self.base_url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == httpx.codes.OK, f"{answer.text}\n{vllm.last_lines(self.log)}"
        parsed: dict[str, Any] = answer.json()
        return parsed

    def interrupt(self) -> int:
        """Press Ctrl-C and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=STOP_SECONDS)


@contextmanager
def serving(directory: Path, arguments: list[str], *, python: Path, errors: Path) -> Iterator[AskedServer]:
    """Serve the checkpoint in `directory` until the block ends.

    Args:
        directory: holds config, weights and tokenizer.
        arguments: of `vllm serve`, as a deployment passes them, `--served-model-name` among them.
        python: of an environment that has vLLM.
        errors: file that gets what gemma-pack writes to stderr.
    """
    [model] = [argument.partition("=")[2] for argument in arguments if argument.startswith("--served-model-name=")]
    others = [argument for argument in arguments if not argument.startswith("--served-model-name=")]
    ours = ["serve", str(directory), "--name", model, "--port", str(vllm.free_port()), "--format", "json"]
    quick = [
        "--enforce-eager",  # compiling would take minutes
        "--max-num-seqs=2",
        f"--max-num-batched-tokens={MAX_BATCHED_TOKENS}",
    ]
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "gemma_pack", *ours, "--", *others, *quick],
            env={**server_environment(python), vllm.VARIABLE: str(python)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        result = read_result(process)
        assert result, errors.read_text("utf-8")
        server = AskedServer(
            base_url=result["base_url"].removesuffix("/v1"),
            model=result["model"],
            log=Path(result["log"]),
            call=result["call"],
            process=process,
        )
        try:
            yield server
        finally:
            server.interrupt()


def read_result(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """Return the JSON object that a process prints and goes on after; None if it ends before."""
    told = ""
    for line in process.stdout or ():
        told += line
        if line == "}\n":
            result: dict[str, Any] = json.loads(told)
            return result
    return None


def descendants(pid: int) -> set[int]:
    """Return the processes that `pid` started, and those that they started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text("utf-8").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found |= set(new)
        waiting += new
    return found


def runs(pid: int) -> bool:
    """Whether the process is there and not merely waiting to be reaped."""
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text("utf-8")
    except (ProcessLookupError, FileNotFoundError):
        return False


def server_environment(python: Path) -> dict[str, str]:
    """Return variables for a vLLM that asks nothing of a network and keeps what it learns beside its Python."""
    return vllm.private_environment() | {
        "VLLM_CACHE_ROOT": str(python.parent.parent / "cache"),  # what it knows of an architecture, for the next start
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # else one of two cores is its scheduler's alone
        "VLLM_CPU_INT4_W4A8": "0",  # int4 weights with bf16 activations, as on a GPU; the CPU build rounds these, too
    }
