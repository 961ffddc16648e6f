"""Measures two models through readings: of servers, one after the other where one machine has to serve both.

First all that the base must do, then all that the variant must do, then the comparison. Each window that is read is
kept on disk at once, so that a server that dies costs no window twice: the same command goes on.
"""

from __future__ import annotations

import hashlib
import io
import math
import shutil
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
from gemma_pack.evaluation.measured import Measured
from gemma_pack.evaluation.parity import compare_read_answers, read_answers
from gemma_pack.evaluation.top_k import TOP_K, compare_readings, noise_between

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.engines.reading import Reader
    from gemma_pack.evaluation.likelihood import TokenScores
    from gemma_pack.evaluation.measured import Ids, Pair
    from gemma_pack.evaluation.prompts import Prompt
    from gemma_pack.record import FileDigest
    from gemma_pack.report import TopK

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


def require_answering(servers: Servers, window: int) -> None:
    """Raise unless each server that runs already can be asked about windows of `window` tokens.

    Asked before anything else is done, and once: whoever names a server that is not there learns of it at once.

    Raises:
        As `ServerReader`.
    """
    if servers.own:
        return
    named = [(servers.variant, "variant", servers.model), (servers.base, "base", servers.base_model)]
    for url, role, model in named:
        if url:
            with closing(ServerReader(url, role, model=model, attempts=1)) as reader:
                reader.require_length(window)


class Served:
    """Servers, asked one after the other, because one machine may have to serve both."""

    def __init__(self, servers: Servers, pair: Pair) -> None:
        """Ask nothing yet."""
        self._servers = servers
        self._pair = pair
        self._probe: list[int] = []
        self._local: list[Reading] = []
        servers.kept.mkdir(parents=True, exist_ok=True)

    def measure(self, ids: Ids, prompts: Sequence[Prompt]) -> Measured:
        """Measure all there is; see `Measuring`."""
        pair = self._pair
        asked = [prompt.ids for prompt in prompts]
        self._probe = ids[0].tolist()
        with_answers = max(len(prompt) + pair.answer_tokens for prompt in asked)
        longest = max(ids.shape[1], with_answers, TASK_TOKENS if pair.ask else 0) + 1
        with self._base_reader(longest) as base:
            windows = self._read_windows(base, ids)
            without_bos = base.read(ids[:BOS_WINDOWS, 1:].tolist(), 1)
            bos_check = judge_bos(
                float(np.mean([reading.nll[1:] for reading in windows[:BOS_WINDOWS]])),
                float(np.mean([reading.nll for reading in without_bos])),
            )
            again = [base.read([row], TOP_K)[0] for row in ids[:NOISE_WINDOWS].tolist()]
            theirs = base.answers(asked, pair.answer_tokens)
            base_forced = read_answers(base, asked, theirs)
            base_engine = base.describe()
            base_scored = pair.ask(base) if pair.ask else None
        with self._variant_reader(longest) as variant:
            served = self._read_windows(variant, ids)
            ours = variant.answers(asked, pair.answer_tokens)
            variant_forced = read_answers(variant, asked, theirs)
            engine = variant.describe()
            scored = pair.ask(variant) if pair.ask else None
        scores, top_k = compare_readings(windows, served)
        readings = list(zip(base_forced, variant_forced, strict=True))
        return Measured(
            scores=scores,
            top_k=top_k,
            bos_check=bos_check,
            noise_floor=noise_between(windows[: len(again)], again, batch=1),
            parity=compare_read_answers(prompts, theirs, ours, readings, limit=pair.answer_tokens, decode=pair.decode),
            engine=engine if base_engine.name == engine.name else engine.model_copy(update={"base": base_engine.name}),
            tasks=(base_scored, scored) if base_scored is not None and scored is not None else None,
        )

    def rescore(self, ids: Ids) -> tuple[TokenScores, TopK]:
        """Score the windows, reading only those that were not read before."""
        longest = ids.shape[1] + 1
        with self._base_reader(longest) as base:
            windows = self._read_windows(base, ids)
        with self._variant_reader(longest) as variant:
            return compare_readings(windows, self._read_windows(variant, ids))

    def _read_windows(self, reader: Reader, ids: Ids) -> list[Reading]:
        """Return the reading of each window; those that an earlier run kept are not read again."""
        is_base = reader.role == "base"
        files = self._pair.base_files if is_base else self._pair.variant_files
        engine = self._servers.base or self._servers.variant if is_base else self._servers.variant
        return _read_windows(reader, self._servers.kept / _key(files, engine), ids, self._pair.reporter)

    @contextmanager
    def _base_reader(self, longest: int) -> Iterator[Reader]:
        servers = self._servers
        if servers.own:
            with self._started(self._pair.base, "base", longest) as reader:
                yield reader
        elif servers.base:
            with _asked(servers.base, "base", servers.base_model) as asked, self._same_model(asked):
                yield asked
        else:
            with self._resident(self._pair.base, "base") as reader:
                yield reader

    @contextmanager
    def _variant_reader(self, longest: int) -> Iterator[Reader]:
        if self._servers.own:
            with self._started(self._pair.variant, "variant", longest) as reader:
                yield reader
        else:
            with _asked(self._servers.variant, "variant", self._servers.model) as reader, self._same_model(reader):
                yield reader

    @contextmanager
    def _started(self, directory: Path, role: str, longest: int) -> Iterator[ServerReader]:
        """Serve `directory` and read what is served until the block ends."""
        self._pair.reporter.status(f"starting vLLM's server for the {role}")
        log = self._servers.kept / f"vllm-{role}.log"
        with (
            reading_server(directory, max_model_len=longest, log=log) as address,
            _asked(address, role, SERVED_NAME, own=True) as reader,
        ):
            yield reader

    @contextmanager
    def _resident(self, directory: Path, role: str) -> Iterator[ResidentReader]:
        pair = self._pair
        require_memory(pair.base_size_bytes, pair.device)  # a variant is dequantized to bf16
        pair.reporter.status(f"loading the {role} on {pair.device}")
        yield ResidentReader(load(directory, role, pair.device), pair.describe)

    @contextmanager
    def _same_model(self, reader: ServerReader) -> Iterator[None]:
        """Check what serves now before any of it is kept, and again at the end; keep nothing of another model."""
        self._require_served(reader)
        yield
        try:
            self._require_served(reader)
        except CheckpointError:
            shutil.rmtree(self._servers.kept, ignore_errors=True)
            raise

    def _require_served(self, reader: ServerReader) -> None:
        """Raise CheckpointError unless the server reads one window as the files here do, nearer to its own.

        A name or a path says nothing: a server that serves the base by mistake would pass any gate.
        """
        names = ("base", "variant")
        if not self._local:
            for directory, role in zip((self._pair.base, self._pair.variant), names, strict=True):
                with self._resident(directory, role) as resident:
                    self._local += resident.read([self._probe], 1)
        [fresh] = reader.read([self._probe], 1)
        own = names.index(reader.role)
        other = 1 - own
        distances = [_distance(fresh, reading) for reading in self._local]
        if distances[own] > STRANGER_NATS:
            raise CheckpointError(
                f"{reader.url} serves another model than this {names[own]}: what it says of a token differs by "
                f"{distances[own]:.2f} nats (root mean square)",
                hint=f"serve the {names[own]} there, or name it with --served-model",
            )
        if distances[own] > distances[other]:
            raise CheckpointError(
                f"{reader.url} should serve the {names[own]}, and what it says is nearer to the {names[other]}: "
                f"{distances[other]:.3f} nats of difference, {distances[own]:.3f} to the {names[own]}",
                hint=f"serve the {names[own]} there",
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


def _keep(path: Path, reading: Reading) -> None:
    stream = io.BytesIO()
    np.savez(stream, ids=reading.ids, nll=reading.nll, top_ids=reading.top_ids, top_logprobs=reading.top_logprobs)
    write_atomic(path, stream.getvalue())


def _kept(path: Path) -> Reading:
    with np.load(path, allow_pickle=False) as arrays:
        return Reading(**{name: arrays[name] for name in ("ids", "nll", "top_ids", "top_logprobs")})


@contextmanager
def _asked(url: str, role: str, model: str | None, *, own: bool = False) -> Iterator[ServerReader]:
    with closing(ServerReader(url, role, model=model, own=own)) as reader:
        yield reader


def _distance(one: Reading, other: Reading) -> float:
    """Return the root mean square of the difference of ln p of the tokens that were read."""
    return math.sqrt(float(np.mean(np.square(one.nll - other.nll, dtype=np.float64))))
