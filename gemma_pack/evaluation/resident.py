"""Measures two models in this process: both in memory, or one after the other where only one fits."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from gemma_pack.checkpoint import read_json
from gemma_pack.disk import require_space, write_atomic
from gemma_pack.errors import QuantizationError
from gemma_pack.evaluation.distributions import compare_states
from gemma_pack.evaluation.engines.in_process import fits_memory, load, require_memory
from gemma_pack.evaluation.engines.reading import ResidentReader
from gemma_pack.evaluation.likelihood import (
    batch_windows,
    check_bos,
    join_scores,
    measure_noise,
    score,
)
from gemma_pack.evaluation.measured import Measured
from gemma_pack.evaluation.parity import compare_answers, compare_read_answers, read_answers
from gemma_pack.gemma import text_config
from gemma_pack.report import Spilled

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from gemma_pack.evaluation.engines.in_process import Model
    from gemma_pack.evaluation.likelihood import TokenScores
    from gemma_pack.evaluation.measured import Ids, Measuring, Pair
    from gemma_pack.evaluation.prompts import Prompt


def resident_engine(pair: Pair) -> Measuring:
    """Return what measures the pair in this process, as memory allows.

    Raises:
        MachineError: not even one of the models fits.
    """
    if fits_memory(2 * pair.base_size_bytes, pair.device):  # the variant is dequantized to bf16
        return Together(pair)
    config = text_config(read_json(pair.base / "config.json"))
    head_bytes = 2 * int(config.get("vocab_size", 0)) * int(config.get("hidden_size", 0))  # what stays of the base
    require_memory(pair.base_size_bytes + head_bytes, pair.device)
    pair.reporter.warn(f"base and variant do not fit on {pair.device} together; they are read one after the other")
    return OneAfterTheOther(pair)


class _Known:
    """Scores of windows that were read, so that none is read twice."""

    def __init__(self) -> None:
        self._windows: dict[bytes, TokenScores] = {}

    def missing(self, ids: Ids) -> Ids:
        fresh: Ids = ids[[row.tobytes() not in self._windows for row in ids]]
        return fresh

    def add(self, ids: Ids, scores: TokenScores) -> None:
        self._windows |= {row.tobytes(): scores.window(place) for place, row in enumerate(ids)}

    def of(self, ids: Ids) -> TokenScores:
        return join_scores([self._windows[row.tobytes()] for row in ids])


class Together:
    """Both models in memory."""

    def __init__(self, pair: Pair) -> None:
        """Load both."""
        self._pair = pair
        self._known = _Known()
        pair.reporter.status(f"loading base and variant on {pair.device}")
        self._base = load(pair.base, "base", pair.device)
        self._variant = load(pair.variant, "variant", pair.device)

    def measure(self, ids: Ids, prompts: Sequence[Prompt]) -> Measured:
        """Measure all there is; see `Measuring`."""
        pair = self._pair
        bos_check = check_bos(self._base, ids)
        pair.reporter.status("measuring the noise floor: the base against itself")
        readers = [ResidentReader(model, pair.describe) for model in (self._base, self._variant)]
        return Measured(
            bos_check=bos_check,
            noise_floor=measure_noise(self._base, ids),
            scores=self.rescore(ids)[0],
            top_k=None,
            parity=compare_answers(
                self._base, self._variant, prompts, limit=pair.answer_tokens, decode=pair.decode, reporter=pair.reporter
            ),
            engine=pair.describe(self._base),
            tasks=(pair.ask(readers[0]), pair.ask(readers[1])) if pair.ask else None,
        )

    def rescore(self, ids: Ids) -> tuple[TokenScores, None]:
        """Score the windows, reading only those that were not read before."""
        missing = self._known.missing(ids)
        if len(missing):
            self._known.add(missing, score(self._base, self._variant, missing, self._pair.reporter))
        return self._known.of(ids), None


class OneAfterTheOther:
    """The base first, what the comparison needs of it on disk, then the variant."""

    def __init__(self, pair: Pair) -> None:
        """Load nothing yet."""
        self._pair = pair
        self._known = _Known()

    def measure(self, ids: Ids, prompts: Sequence[Prompt]) -> Measured:
        """Measure all there is; see `Measuring`."""
        pair = self._pair
        asked = [prompt.ids for prompt in prompts]
        base = self._load("base")
        bos_check = check_bos(base, ids)
        noise_floor = measure_noise(base, ids)
        reader = ResidentReader(base, pair.describe)
        theirs = reader.answers(asked, pair.answer_tokens)
        base_read = read_answers(reader, asked, theirs)
        base_scored = pair.ask(reader) if pair.ask else None
        engine = pair.describe(base)
        spilled = self._spill(base, ids)
        variant = self._load("variant")
        self._known.add(ids, score(spilled, variant, ids, pair.reporter))
        reader = ResidentReader(variant, pair.describe)
        ours = reader.answers(asked, pair.answer_tokens)
        readings = list(zip(base_read, read_answers(reader, asked, theirs), strict=True))
        return Measured(
            bos_check=bos_check,
            noise_floor=noise_floor,
            scores=self._known.of(ids),
            top_k=None,
            parity=compare_read_answers(prompts, theirs, ours, readings, limit=pair.answer_tokens, decode=pair.decode),
            engine=engine.model_copy(update={"spilled": spilled.error}),
            tasks=(base_scored, pair.ask(reader)) if pair.ask and base_scored is not None else None,
        )

    def rescore(self, ids: Ids) -> tuple[TokenScores, None]:
        """Score the windows, reading only those that were not read before; both models are loaded again for that."""
        missing = self._known.missing(ids)
        if len(missing):
            spilled = self._spill(self._load("base"), missing)
            self._known.add(missing, score(spilled, self._load("variant"), missing, self._pair.reporter))
        return self._known.of(ids), None

    def _load(self, role: str) -> Model:
        self._pair.reporter.status(f"loading the {role} on {self._pair.device}")
        return load(self._pair.base if role == "base" else self._pair.variant, role, self._pair.device)

    def _spill(self, base: Model, ids: Ids) -> SpilledBase:
        key = hashlib.sha256("\n".join(file.sha256 for file in self._pair.base_files).encode()).hexdigest()[:16]
        spilled = SpilledBase(base, self._pair.kept / f"states-{key}")
        hidden_size = int(base.module.config.get_text_config().hidden_size)
        require_space(spilled.directory, 2 * ids.size * hidden_size)
        batch = batch_windows(ids.shape[1])
        with self._pair.reporter.progress("Reading windows with the base", len(ids)) as task:
            for begin in range(0, len(ids), batch):
                spilled.keep(ids[begin : begin + batch])
                task.advance(len(ids[begin : begin + batch]))
        spilled.settle(ids[:batch])
        return spilled


class SpilledBase:
    """The base once its decoder is gone: its last hidden states from disk, its own output head in memory.

    A window's states take 2 · hidden size bytes a token, 7 kB for 9B, where log-probabilities in 16 bits would take
    500 kB, and give the same bf16 logits as the resident model's.
    """

    role = "base"

    def __init__(self, base: Model, directory: Path) -> None:
        """Take the base while it is whole; `directory` keeps the states, a file a window."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.error: Spilled | None = None
        self.soft_cap = base.soft_cap
        self._base = base

    @property
    def device(self) -> torch.device:
        """Where the head lies."""
        return self._base.device

    def keep(self, ids: Ids) -> None:
        """Write the states of the windows `ids`, read together, unless an earlier run did."""
        import torch
        from safetensors.torch import save

        paths = [self._path(row) for row in ids]
        if all(path.exists() for path in paths):
            return
        with torch.inference_mode():
            hidden = self._base.hidden(torch.from_numpy(ids.astype(np.int64)))
        if not bool(torch.isfinite(hidden).all()):
            self._base.fail_not_finite(torch.from_numpy(ids.astype(np.int64)))
        for path, states in zip(paths, hidden.cpu(), strict=True):
            write_atomic(path, save({"hidden": states.contiguous()}))

    def settle(self, ids: Ids) -> None:
        """Measure on the windows `ids` what was lost, then free the decoder."""
        import torch

        rows = torch.from_numpy(ids.astype(np.int64))
        with torch.inference_mode():
            pair = [self._base.hidden(rows), self.hidden(rows)]
            nll, again, kl, *_ = compare_states(pair, self._base, self._base, rows)
        self.error = Spilled(
            size_bytes=sum(path.stat().st_size for path in self.directory.iterdir()),
            kl_nats=float(kl.double().mean()),
            nll_nats=float((again - nll).abs().max()),
        )
        self._base.keep_head_alone()

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the kept states, bf16 [batch, length, hidden], of int64 ids [batch, length]."""
        import torch
        from safetensors.torch import load_file

        rows = ids.cpu().numpy().astype(np.int32)
        return torch.stack([load_file(self._path(row))["hidden"] for row in rows]).to(self.device)

    @property
    def vocabulary_size(self) -> int:
        """The number of logits of a token."""
        return self._base.vocabulary_size

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the base's logits."""
        return self._base.logits(hidden)

    def products(self, hidden: Tensor, part: slice, room: Tensor) -> Tensor:
        """Return the base's products of the ids in `part`, before the soft-cap."""
        return self._base.products(hidden, part, room)

    def fail_not_finite(self, ids: Tensor) -> None:
        """Raise QuantizationError; the states were finite, so it is the head."""
        del ids
        raise QuantizationError(
            "the base computes NaN or infinity, first in the output head", hint="fetch the checkpoint again"
        )

    def _path(self, row: Ids) -> Path:
        return self.directory / f"{hashlib.sha256(row.astype('<i4').tobytes()).hexdigest()}.safetensors"
