"""A loaded model that says one token after another, and remembers what it has read.

The loop is written out rather than left to `generate`, so that a token is there when it is drawn, Ctrl-C stops between
two, and a conversation is not read again from its beginning at every question.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.chat.loading import load_module
from gemma_pack.chat.sampling import draw
from gemma_pack.errors import CheckpointError, InvalidUsageError, MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from gemma_pack.chat.presets import Plan
    from gemma_pack.chat.sampling import Sampling
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Reporter

WARM_UPS: Final = 2
"""The first round compiles, the second shows that nothing is left to compile; on a GPU it records the CUDA graph."""


class SpokenModel:
    """A model, its KV cache, and the ids that the cache holds."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, *, context: int, seed: int, reporter: Reporter) -> None:
        """Load `checkpoint` as `plan` says, for conversations of at most `context` tokens; warm up where it compiles.

        Raises:
            CheckpointError: transformers cannot load it.
            MachineError: it does not fit, or cannot be compiled here.
        """
        import torch

        self.plan = plan
        self.context = context
        begin = time.monotonic()
        offload = tempfile.mkdtemp(prefix="gemma-pack-offload-")
        weakref.finalize(self, shutil.rmtree, offload, ignore_errors=True)
        self._module = load_module(checkpoint, plan, Path(offload))
        self.load_seconds = time.monotonic() - begin
        self._device = torch.device(plan.device)
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._read: list[int] = []
        self._cache: Any = None
        self._step: Callable[[Tensor], Tensor] = self._logits
        self.ends = _end_tokens(self._module)
        self.compiled_graphs = self._compile(reporter) if plan.preset == "speed" else 0

    def stream(self, ids: Sequence[int], sampling: Sampling, limit: int) -> Iterator[int]:
        """Yield at most `limit` tokens that continue `ids`, as they are drawn, an end token included.

        What the cache holds already of `ids` is not read again.

        Raises:
            InvalidUsageError: `ids` leave no room in the context.
            CheckpointError: the model computes NaN or infinity.
        """
        import torch

        limit = min(limit, self.context - len(ids))
        if limit < 1:
            raise InvalidUsageError(
                f"{len(ids)} tokens do not fit into a context of {self.context}",
                hint="ask for a longer one with --context, or begin a new session",
            )
        logits = self._prefill(list(ids))
        for number in range(limit):
            if not bool(torch.isfinite(logits.max())):
                raise CheckpointError(
                    "the model computes NaN or infinity",
                    hint="its weights are damaged, or int8 overflows: try bfloat16",
                )
            token = draw(logits, sampling, self._generator)
            yield token
            if token in self.ends or number == limit - 1:
                return
            logits = self._feed([token], self._step)

    def _prefill(self, ids: list[int]) -> Tensor:
        """Read what is new in `ids`; all of it where the cache holds something else."""
        known = len(self._read)
        if not known or self._read != ids[:known] or known == len(ids):
            self.forget()
            known = 0
        return self._feed(ids[known:], self._logits)

    def _feed(self, ids: list[int], step: Callable[[Tensor], Tensor]) -> Tensor:
        """Read `ids` and return float32 logits [vocabulary] of what follows."""
        import torch

        before, self._read = self._read, []  # if this is interrupted, the cache is worth nothing
        with torch.inference_mode():
            logits = step(torch.tensor([ids], device=self._device))
        self._read = [*before, *ids]
        return logits

    def _logits(self, ids: Tensor) -> Tensor:
        output = self._module(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def forget(self) -> None:
        """Empty the cache."""
        import torch
        from transformers import DynamicCache

        self._read = []
        if self.plan.preset != "speed":
            self._cache = DynamicCache(config=self._module.config)
        elif self._cache is None:
            self._cache = _static_cache(self._module.config, self.context)
        else:
            with torch.inference_mode():
                self._cache.reset()  # not made anew: where it lies is compiled in

    def _compile(self, reporter: Reporter) -> int:
        """Compile the step of one token and run it until nothing is left to compile; return the number of graphs.

        Raises:
            MachineError: there is no compiler for it, or nothing was compiled.
        """
        import torch
        from torch._dynamo.exc import TorchDynamoException
        from torch._dynamo.utils import counters

        mode = "reduce-overhead" if self._device.type == "cuda" else None  # CUDA graphs, as transformers chooses
        self._step = torch.compile(self._logits, mode=mode, fullgraph=True, dynamic=False)
        before = counters["stats"]["unique_graphs"]
        for number in range(1, WARM_UPS + 1):
            reporter.status(f"warm-up {number} of {WARM_UPS}{': compiling, which takes minutes' * (number == 1)}")
            self.forget()
            self._feed([2, 2], self._logits)
            try:
                for _ in range(3):
                    self._feed([2], self._step)
            except TorchDynamoException as error:
                raise MachineError(
                    f"torch.compile cannot compile the model here: {str(error).strip().splitlines()[0]}",
                    hint="install a C++ compiler (g++), or use --preset exact",
                ) from error
        self.forget()
        graphs = int(counters["stats"]["unique_graphs"] - before)
        if not graphs:
            raise MachineError(
                "torch.compile compiled nothing here", hint="unset TORCHDYNAMO_DISABLE, or use --preset exact"
            )
        return graphs


def _static_cache(config: Any, context: int) -> Any:  # noqa: ANN401 - of transformers
    """Return a KV cache of fixed size whose length is a tensor in every layer, so that a step is compiled once.

    A sliding layer of transformers (`StaticSlidingWindowLayer`) counts its tokens in a Python int, on which
    torch.compile specializes: it would compile anew for each token, eight times, and fail. So sliding layers keep all
    tokens too, as much memory as a full layer takes; masks go by the config and hide what lies outside the window.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    cache = StaticCache(config=config, max_cache_len=context)
    cache.layers = [StaticLayer(max_cache_len=context) for _ in cache.layers]
    return cache


def _end_tokens(module: Any) -> frozenset[int]:  # noqa: ANN401 - a transformers model
    """Return the ids that end an answer: of generation_config.json, else of config.json."""
    declared = getattr(module.generation_config, "eos_token_id", None)
    if declared is None:
        declared = module.config.get_text_config().eos_token_id
    return frozenset([declared] if isinstance(declared, int) else declared or [])
