"""What every engine can say of a sequence of tokens: how likely each was, and what was most likely instead.

A server shows no more of a distribution than its k most likely tokens, so this is what a model in this process and one
behind HTTP have in common. Sequences are token ids that the caller has put one <bos> before; nothing is added here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from gemma_pack.evaluation.engines.in_process import Answer, Model
    from gemma_pack.report import Engine

BATCH_TOKENS: Final = 2048
"""Tokens of one forward pass, padding included."""
ANSWERED_AT_ONCE: Final = 16
"""Prompts that are answered together."""
HEAD_TOKENS: Final = 32
"""Tokens whose logits are held at once: 34 MB of a vocabulary of 262,144."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a model made of each token of one sequence after its first; arrays are [length - 1] and [length - 1, k]."""

    ids: npt.NDArray[np.int32]
    """The tokens that were read."""
    nll: npt.NDArray[np.float32]
    """Their -ln p."""
    top_ids: npt.NDArray[np.int32]
    """The k most likely tokens, the most likely first; of equally likely ones the one with the smaller id."""
    top_logprobs: npt.NDArray[np.float32]
    """Their ln p."""

    @property
    def top1(self) -> npt.NDArray[np.int32]:
        """The most likely token at each place."""
        first: npt.NDArray[np.int32] = self.top_ids[:, 0]
        return first

    def last(self, count: int) -> Reading:
        """Return the reading of the last `count` tokens."""
        begin = len(self.nll) - count
        return Reading(
            ids=self.ids[begin:],
            nll=self.nll[begin:],
            top_ids=self.top_ids[begin:],
            top_logprobs=self.top_logprobs[begin:],
        )


Done = Callable[[int, Reading], object]
"""Called with the place of a sequence and its reading; from several threads where an engine has several."""


def ignore(place: int, reading: Reading) -> None:
    """Do nothing with a reading."""


class Reader(Protocol):
    """A model that reads sequences and answers prompts."""

    role: str
    """How errors name it: `base` or `variant`."""
    max_length: int
    """The longest sequence that it reads, in tokens."""

    def read(self, sequences: Sequence[Sequence[int]], k: int, done: Done = ...) -> list[Reading]:
        """Return the reading of each sequence, in their order; `done` is told of each as soon as it is there."""

    def answers(self, prompts: Sequence[Sequence[int]], limit: int) -> list[Answer]:
        """Return the greedy continuations of `prompts`, of at most `limit` tokens each."""

    def describe(self) -> Engine:
        """Return what the report says of the engine."""


class ResidentReader:
    """A model in this process as a Reader."""

    def __init__(self, model: Model, describe: Callable[[Model], Engine]) -> None:
        """Take a loaded model, and what describes its engine."""
        self.model = model
        self.role = model.role
        self.max_length: int = model.module.config.get_text_config().max_position_embeddings
        self._describe = describe

    def read(self, sequences: Sequence[Sequence[int]], k: int, done: Done = ignore) -> list[Reading]:
        """Return the reading of each sequence.

        Sequences of like length go through the decoder together, padded on the right, where no token before sees it.

        Raises:
            QuantizationError: the model computes NaN or infinity.
        """
        import torch

        readings: dict[int, Reading] = {}
        for places in _batches([len(sequence) for sequence in sequences]):
            length = max(len(sequences[place]) for place in places)
            rows = torch.tensor([[*sequences[p], *[0] * (length - len(sequences[p]))] for p in places])
            with torch.inference_mode():
                hidden = self.model.hidden(rows)
                for row, place in enumerate(places):
                    readings[place] = self._read_one(hidden[row], rows[row : row + 1, : len(sequences[place])], k)
                    done(place, readings[place])
        return [readings[place] for place in range(len(sequences))]

    def answers(self, prompts: Sequence[Sequence[int]], limit: int) -> list[Answer]:
        """Return the greedy continuations of `prompts`, answered a few at once."""
        import torch

        parts = [prompts[begin : begin + ANSWERED_AT_ONCE] for begin in range(0, len(prompts), ANSWERED_AT_ONCE)]
        with torch.inference_mode():
            return [answer for part in parts for answer in self.model.answers(part, limit)]

    def describe(self) -> Engine:
        """Return what the report says of the engine."""
        return self._describe(self.model)

    def _read_one(self, hidden: Any, row: Any, k: int) -> Reading:  # noqa: ANN401 - tensors
        """Return the reading of the int64 ids `row` [1, length], whose last hidden states begin `hidden`."""
        import torch

        targets = row[0, 1:].to(self.model.device)
        nll: list[Any] = []
        tops: list[Any] = []
        for begin in range(0, len(targets), HEAD_TOKENS):
            few = targets[begin : begin + HEAD_TOKENS]
            logits = self.model.logits(hidden[begin : begin + len(few)])
            logprobs = torch.log_softmax(logits, -1)
            nll.append(-logprobs.gather(1, few[:, None])[:, 0])
            tops.append(logprobs.topk(k))
        found = torch.cat(nll)
        if not bool(torch.isfinite(found).all()):
            self.model.fail_not_finite(row)
        return ordered(
            ids=row[0, 1:].numpy(),
            nll=found.cpu().numpy(),
            top_ids=torch.cat([top.indices for top in tops]).cpu().numpy(),
            top_logprobs=torch.cat([top.values for top in tops]).cpu().numpy(),
        )


def ordered(
    *, ids: npt.NDArray[Any], nll: npt.NDArray[Any], top_ids: npt.NDArray[Any], top_logprobs: npt.NDArray[Any]
) -> Reading:
    """Return a reading whose top tokens, [length - 1, k] in any order, stand in the order that it promises."""
    order = np.lexsort((top_ids, -top_logprobs), axis=1)
    return Reading(
        ids=ids.astype(np.int32),
        nll=nll.astype(np.float32),
        top_ids=np.take_along_axis(top_ids, order, 1).astype(np.int32),
        top_logprobs=np.take_along_axis(top_logprobs, order, 1).astype(np.float32),
    )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group the places of sequences, longest first, so that a group padded to its longest has few enough tokens."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if group and lengths[group[0]] * (len(group) + 1) > BATCH_TOKENS:
            yield group
            group = []
        group.append(place)
    if group:
        yield group
