"""Measures two models through readings: of servers, one after the other where one machine has to serve both.

First all that the base must do, then all that the variant must do, then the comparison. Each window that is read is
kept on disk at once, so that a server that dies costs no window twice: the same command goes on.
"""

from __future__ import annotations

import hashlib
import io
import math
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from gemma_pack.disk import write_atomic
from gemma_pack.errors import CheckpointError, EngineError
from gemma_pack.evaluation.engines.in_process import load, require_memory
from gemma_pack.evaluation.engines.reading import Reading, ResidentReader
from gemma_pack.evaluation.engines.server import ServerReader
from gemma_pack.evaluation.engines.vllm import SERVED_NAME, reading_server
from gemma_pack.evaluation.likelihood import BOS_WINDOWS, NOISE_WINDOWS, judge_bos
from gemma_pack.evaluation.parity import NEAR_TIE_TOP, compare_read_answers
from gemma_pack.evaluation.top_k import TOP_K, compare_readings, noise_between

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.engines.in_process import Answer, Model
    from gemma_pack.evaluation.engines.reading import Reader
    from gemma_pack.evaluation.likelihood import TokenScores
    from gemma_pack.evaluation.prompts import Prompt
    from gemma_pack.record import FileDigest
    from gemma_pack.report import BosCheck, Engine, NoiseFloor, Parity, TopK
    from gemma_pack.task_results import SkippedTask, TaskScores

    Ids = npt.NDArray[np.int32]
    Scored = dict[str, TaskScores | SkippedTask]

TASK_TOKENS: Final = 8192
"""What a server that is started here reads at most where there are tasks; few-shot prompts are longer than windows."""
STRANGER_NATS: Final = 0.5
"""Root mean square of the difference of a token's ln p, beyond which two engines do not compute one model: bf16
arithmetic of two engines leaves 0.05 on Gemma 3 270M."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Which servers are asked."""

    variant: str
    """The address of one that serves the variant, or `vllm` to start vLLM's for base and variant."""
    base: str | None = None
    """The address of one that serves the base; without it, the base is read in this process."""
    model: str | None = None
    """What the variant's server calls it, where it serves several."""
    base_model: str | None = None
    kept: Path
    """The directory that keeps what was read."""

    @property
    def own(self) -> bool:
        """Whether vLLM's server is started and stopped here."""
        return self.variant == "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two models: where they lie, and their weight files."""

    base: Path
    variant: Path
    base_files: tuple[FileDigest, ...]
    variant_files: tuple[FileDigest, ...]
    base_size_bytes: int
    device: str
    """Where this process computes what no server does."""


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


def measure_served(
    servers: Servers,
    pair: Pair,
    ids: Ids,
    prompts: Sequence[Prompt],
    *,
    limit: int,
    decode: Callable[[Sequence[int]], str],
    describe: Callable[[Model], Engine],
    ask: Callable[[Reader], Scored] | None,
    reporter: Reporter,
) -> Measured:
    """Measure both on the windows `ids`, int32 [windows, sequence_length], and on answers of at most `limit` tokens.

    `ask` runs the tasks on a reader, where there are some.

    Raises:
        EngineError: a server failed for good; what was read is kept.
        CheckpointError: a server serves another model.
        MachineError: the baseline is broken, or what must be read in this process does not fit.
        QuantizationError: a model computes NaN.
    """
    asked = [prompt.ids for prompt in prompts]
    longest = max(ids.shape[1], *(len(prompt) + limit for prompt in asked), TASK_TOKENS if ask else 0) + 1
    servers.kept.mkdir(parents=True, exist_ok=True)
    with _base_reader(servers, pair, longest, describe, reporter) as base:
        key = _key(pair.base_files, servers.base or servers.variant)
        windows = _read_windows(base, servers.kept / key, ids, reporter)
        without_bos = base.read(ids[:BOS_WINDOWS, 1:].tolist(), 1)
        bos_check = judge_bos(
            float(np.mean([reading.nll[1:] for reading in windows[:BOS_WINDOWS]])),
            float(np.mean([reading.nll for reading in without_bos])),
        )
        again = [base.read([row], TOP_K)[0] for row in ids[:NOISE_WINDOWS].tolist()]
        theirs = base.answers(asked, limit)
        base_forced = _read_answers(base, asked, theirs)
        base_engine = base.describe()
        base_scored = ask(base) if ask else None
    with _variant_reader(servers, pair, longest, reporter) as variant:
        served = _read_windows(variant, servers.kept / _key(pair.variant_files, servers.variant), ids, reporter)
        ours = variant.answers(asked, limit)
        variant_forced = _read_answers(variant, asked, theirs)
        engine = variant.describe()
        scored = ask(variant) if ask else None
    if not servers.own:
        _require_served(servers, pair, ids[0].tolist(), (windows[0], served[0]), describe=describe, reporter=reporter)
    scores, top_k = compare_readings(windows, served)
    return Measured(
        scores=scores,
        top_k=top_k,
        bos_check=bos_check,
        noise_floor=noise_between(windows[: len(again)], again, batch=1),
        parity=compare_read_answers(
            prompts, theirs, ours, list(zip(base_forced, variant_forced, strict=True)), limit=limit, decode=decode
        ),
        engine=engine if base_engine.name == engine.name else engine.model_copy(update={"base": base_engine.name}),
        tasks=(base_scored, scored) if base_scored is not None and scored is not None else None,
    )


def _read_windows(reader: Reader, kept: Path, ids: Ids, reporter: Reporter) -> list[Reading]:
    """Return the reading of each window; those that `kept` has from an earlier run are not read again."""
    kept.mkdir(exist_ok=True)
    rows: list[list[int]] = ids.tolist()
    paths = [kept / f"{hashlib.sha256(row.tobytes()).hexdigest()}.npz" for row in ids.astype("<i4")]
    missing = [place for place, path in enumerate(paths) if not path.exists()]
    with reporter.progress(f"Reading windows with the {reader.role}", len(rows)) as task:
        task.advance(len(rows) - len(missing))

        def keep(place: int, reading: Reading) -> None:
            _keep(paths[missing[place]], reading)
            task.advance()

        try:
            reader.read([rows[place] for place in missing], TOP_K, keep)
        except EngineError as error:
            there = sum(path.exists() for path in paths)
            raise EngineError(
                error.message,
                hint=f"{there} of {len(rows)} windows of the {reader.role} are kept in {kept.parent}: "
                "look into the server's log, then run the same command again to go on",
            ) from error
    return [_kept(path) for path in paths]


def _key(files: Sequence[FileDigest], engine: str) -> str:
    """Return the name of the directory that keeps the readings of these weights by this engine."""
    return hashlib.sha256("\n".join([engine, *(file.sha256 for file in files)]).encode()).hexdigest()[:16]


def _read_answers(reader: Reader, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[Reading]:
    """Return the reading of each answer after its prompt: what the model would have said at each place."""
    pairs = list(zip(prompts, answers, strict=True))
    readings = reader.read([[*prompt, *answer.tokens] for prompt, answer in pairs], NEAR_TIE_TOP)
    return [reading.last(len(answer.tokens)) for reading, answer in zip(readings, answers, strict=True)]


def _keep(path: Path, reading: Reading) -> None:
    stream = io.BytesIO()
    np.savez(stream, ids=reading.ids, nll=reading.nll, top_ids=reading.top_ids, top_logprobs=reading.top_logprobs)
    write_atomic(path, stream.getvalue())


def _kept(path: Path) -> Reading:
    with np.load(path, allow_pickle=False) as arrays:
        return Reading(**{name: arrays[name] for name in ("ids", "nll", "top_ids", "top_logprobs")})


@contextmanager
def _base_reader(
    servers: Servers, pair: Pair, longest: int, describe: Callable[[Model], Engine], reporter: Reporter
) -> Iterator[Reader]:
    if servers.own:
        with _started(pair.base, "base", servers, longest, reporter) as reader:
            yield reader
    elif servers.base:
        with _asked(servers.base, "base", servers.base_model) as reader:
            yield reader
    else:
        with _resident(pair.base, "base", pair, describe, reporter) as reader:
            yield reader


@contextmanager
def _variant_reader(servers: Servers, pair: Pair, longest: int, reporter: Reporter) -> Iterator[Reader]:
    if servers.own:
        with _started(pair.variant, "variant", servers, longest, reporter) as reader:
            yield reader
    else:
        with _asked(servers.variant, "variant", servers.model) as reader:
            yield reader


@contextmanager
def _started(directory: Path, role: str, servers: Servers, longest: int, reporter: Reporter) -> Iterator[ServerReader]:
    """Serve `directory` and read what is served until the block ends."""
    reporter.status(f"starting vLLM's server for the {role}")
    log = servers.kept / f"vllm-{role}.log"
    with (
        reading_server(directory, max_model_len=longest, log=log) as address,
        _asked(address, role, SERVED_NAME, own=True) as reader,
    ):
        yield reader


@contextmanager
def _asked(url: str, role: str, model: str | None, *, own: bool = False) -> Iterator[ServerReader]:
    with closing(ServerReader(url, role, model=model, own=own)) as reader:
        yield reader


@contextmanager
def _resident(
    directory: Path, role: str, pair: Pair, describe: Callable[[Model], Engine], reporter: Reporter
) -> Iterator[ResidentReader]:
    require_memory(pair.base_size_bytes, pair.device)  # a variant is dequantized to bf16
    reporter.status(f"loading the {role} on {pair.device}")
    yield ResidentReader(load(directory, role, pair.device), describe)


def _require_served(
    servers: Servers,
    pair: Pair,
    window: list[int],
    readings: tuple[Reading, Reading],
    *,
    describe: Callable[[Model], Engine],
    reporter: Reporter,
) -> None:
    """Raise CheckpointError unless the servers read one window as the files here do, each nearer to its own.

    `readings` are the base's and the variant's of `window`.

    A name or a path says nothing: a server that serves the base by mistake would pass any gate.
    """
    names = ("base", "variant")
    local = []
    for directory, role in zip((pair.base, pair.variant), names, strict=True):
        with _resident(directory, role, pair, describe, reporter) as reader:
            local += reader.read([window], 1)
    for own, url in ((1, servers.variant), (0, servers.base)):
        if url is None:
            continue
        other = 1 - own
        distances = [_distance(readings[own], reading) for reading in local]
        if distances[own] > STRANGER_NATS:
            raise CheckpointError(
                f"{url} serves another model than this {names[own]}: what it says of a token differs by "
                f"{distances[own]:.2f} nats (root mean square)",
                hint=f"serve the {names[own]} there, or name it with --served-model",
            )
        if distances[own] > distances[other]:
            raise CheckpointError(
                f"{url} should serve the {names[own]}, and what it says is nearer to the {names[other]}: "
                f"{distances[other]:.3f} nats of difference, {distances[own]:.3f} to the {names[own]}",
                hint=f"serve the {names[own]} there",
            )


def _distance(one: Reading, other: Reading) -> float:
    """Return the root mean square of the difference of ln p of the tokens that were read."""
    return math.sqrt(float(np.mean(np.square(one.nll - other.nll, dtype=np.float64))))
