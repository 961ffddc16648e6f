"""vLLM's server for one of the two models that are compared, with the options that reading windows wants."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from gemma_pack.vllm import find_vllm, private_environment, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVED_NAME: Final = "model"
START_SECONDS: Final = 900
"""A 27B model from a slow disk takes minutes."""
KV_CACHE_GB: Final = 2
"""On a CPU, where vLLM would take 4 GB: a few windows need far less."""
BATCHED_TOKENS: Final = 1024
"""Of one step: the log-probabilities of so many tokens are held at once, 1.1 GB of a vocabulary of 262,144."""


@contextmanager
def reading_server(directory: Path, *, max_model_len: int, log: Path) -> Iterator[str]:
    """Serve the checkpoint in `directory` until the block ends; yield the server's address.

    Args:
        directory: holds config, weights and tokenizer.
        max_model_len: the longest sequence, in tokens.
        log: file that gets the server's output.

    Raises:
        EngineError: the server died, or was not healthy in time; the message ends with its last words.
        MachineError: there is no vLLM.
    """
    arguments = [
        f"--served-model-name={SERVED_NAME}",
        "--dtype=bfloat16",
        f"--max-model-len={max_model_len}",
        f"--max-num-batched-tokens={BATCHED_TOKENS}",
        "--max-num-seqs=8",
        "--enforce-eager",  # compiling and capturing graphs would take longer than all that is asked
        "--no-enable-prefix-caching",  # windows share nothing
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB), **private_environment()}
    with serving(
        find_vllm(), directory.resolve(), arguments, log=log, environment=environment, start_seconds=START_SECONDS
    ) as server:
        yield server.base_url
