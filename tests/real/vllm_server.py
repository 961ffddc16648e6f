"""vLLM's own server on loopback, for one model directory, as the tests ask it.

Three processes import torch one after another, which is most of a start; the flags keep the rest short.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import httpx

from gemma_pack import vllm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_SECONDS: Final = 240
KV_CACHE_GB: Final = 1
MAX_BATCHED_TOKENS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedServer:
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
        assert answer.status_code == httpx.codes.OK, f"{answer.text}\n{vllm.last_lines(self.log)}"
        parsed: dict[str, Any] = answer.json()
        return parsed


@contextmanager
def serving(directory: Path, arguments: list[str], *, python: Path, log: Path) -> Iterator[AskedServer]:
    """Serve the checkpoint in `directory` until the block ends.

    Args:
        directory: holds config, weights and tokenizer.
        arguments: of `vllm serve`, as a deployment passes them, `--served-model-name` among them.
        python: of an environment that has vLLM.
        log: file that gets the server's output.
    """
    quick = [
        "--enforce-eager",  # compiling would take minutes
        "--max-num-seqs=2",
        f"--max-num-batched-tokens={MAX_BATCHED_TOKENS}",
    ]
    environment = server_environment(python)
    with vllm.serving(
        python, directory, [*arguments, *quick], log=log, environment=environment, start_seconds=START_SECONDS
    ) as server:
        [model] = [argument.partition("=")[2] for argument in arguments if argument.startswith("--served-model-name=")]
        yield AskedServer(base_url=server.base_url, model=model, log=log, start_seconds=server.start_seconds)


def server_environment(python: Path) -> dict[str, str]:
    """Return variables for a vLLM that asks nothing of a network and keeps what it learns beside its Python."""
    return vllm.private_environment() | {
        "VLLM_CACHE_ROOT": str(python.parent.parent / "cache"),  # what it knows of an architecture, for the next start
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
    }
