"""What an engine is asked for and what it gives back: all that is measured of base and variant, before it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.engines.in_process import Model
    from gemma_pack.evaluation.engines.reading import Reader
    from gemma_pack.evaluation.likelihood import TokenScores
    from gemma_pack.evaluation.prompts import Prompt
    from gemma_pack.record import FileDigest
    from gemma_pack.report import BosCheck, Engine, NoiseFloor, Parity, TopK
    from gemma_pack.task_results import SkippedTask, TaskScores

    Ids = npt.NDArray[np.int32]
    Scored = dict[str, TaskScores | SkippedTask]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two models, where they lie and where they are computed, and how."""

    base: Path
    variant: Path
    base_files: tuple[FileDigest, ...]
    variant_files: tuple[FileDigest, ...]
    base_size_bytes: int
    device: str
    """Where this process computes what no server does."""
    answer_tokens: int
    """Tokens of an answer at most."""
    kept: Path
    """A directory for what an interrupted run need not do again."""
    decode: Callable[[Sequence[int]], str]
    describe: Callable[[Model], Engine]
    ask: Callable[[Reader], Scored] | None
    """Runs the tasks on a model, where there are some."""
    reporter: Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All that was measured of base and variant."""

    scores: TokenScores
    top_k: TopK | None
    bos_check: BosCheck
    noise_floor: NoiseFloor
    parity: Parity
    engine: Engine
    tasks: tuple[Scored, Scored] | None = None
    """What base and variant scored on the tasks."""


class Measuring(Protocol):
    """An engine that has both models at its hands."""

    def measure(self, ids: Ids, prompts: Sequence[Prompt]) -> Measured:
        """Measure all there is, on the windows `ids`, int32 [windows, sequence_length], and by answers to `prompts`.

        Raises:
            EngineError: a server failed for good; what was read is kept.
            CheckpointError: a server serves another model.
            MachineError: the baseline is broken, or what must be read in this process does not fit.
            QuantizationError: a model computes NaN or infinity.
        """

    def rescore(self, ids: Ids) -> tuple[TokenScores, TopK | None]:
        """Score the windows `ids`, reading only those that were not read before."""
