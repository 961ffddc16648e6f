"""What each preset gives on this machine: tokens a second, time to the first token, peak memory.

Each preset is measured in a process of its own, so that its peak is its own and one that does not fit stops no other.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma_pack.errors import GemmaPackError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_pack.chat.presets import Plan
    from gemma_pack.console import Reporter

RUNS: Final = 3
"""After one that is not counted. The median is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The figures of one preset, medians of RUNS; `failure` says why there are none."""

    preset: str
    precision: str
    load_seconds: float = 0.0
    first_token_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_bytes: int = 0
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is measured: `tokens` greedy tokens that continue `ids`, an end token notwithstanding."""

    directory: Path
    ids: tuple[int, ...]
    tokens: int


def benchmark(workload: Workload, plans: Sequence[Plan], reporter: Reporter) -> list[Measured]:
    """Measure each plan in turn."""
    measured = []
    for plan in plans:
        reporter.status(f"measuring {plan.preset}, {plan.precision}")
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            try:
                measured.append(pool.submit(measure, workload, plan).result())
            except BrokenProcessPool:
                why = "its process was killed, as the system does where memory runs out"
                measured.append(Measured(preset=plan.preset, precision=plan.precision, failure=why))
    return measured


def measure(workload: Workload, plan: Plan) -> Measured:
    """Measure one plan in this process, whose peak memory is then the plan's."""
    from gemma_pack.chat.conversation import Clock
    from gemma_pack.chat.model import SpokenModel
    from gemma_pack.chat.sampling import GREEDY
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Console

    context = len(workload.ids) + workload.tokens
    try:
        checkpoint = Checkpoint.open(workload.directory)
        model = SpokenModel(checkpoint, plan, context=context, seed=0, reporter=Console("quiet"))
        model.ends = frozenset()
        clocks = []
        for _ in range(1 + RUNS):
            model.forget()
            clock = Clock()
            for _ in clock.watch(model.stream(workload.ids, GREEDY, workload.tokens), frozenset()):
                pass
            clocks.append(clock)
    except GemmaPackError as error:
        return Measured(preset=plan.preset, precision=plan.precision, failure=error.message)
    counted = clocks[1:]
    return Measured(
        preset=plan.preset,
        precision=plan.precision,
        load_seconds=model.load_seconds,
        first_token_seconds=statistics.median(clock.first_token_seconds or 0.0 for clock in counted),
        tokens_per_second=statistics.median(clock.tokens_per_second or 0.0 for clock in counted),
        peak_bytes=peak_bytes(plan.device),
    )


def peak_bytes(device: str) -> int:
    """Return the most memory that this process held: of the GPU, or resident in host memory.

    VmHWM counts from the start of this program; `ru_maxrss` would count the parent's memory at the fork as well.
    Weights that are mapped from their file count as far as they were touched.
    """
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved())
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
