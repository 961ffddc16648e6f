"""lm-evaluation-harness asks a Reader: its tasks, prompts and scoring, our tokens.

The harness's own model classes put Gemma's <bos> twice before a rolled text, and leave it out where a tokenizer's
settings say so (its issue 3333). Here each request is encoded without special tokens and gets one <bos> in front.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from typing import TYPE_CHECKING, Any, Final

from lm_eval.api.model import LM

from gemma_pack.errors import InvalidUsageError
from gemma_pack.task_results import ItemScores, TaskScores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Tokenizer

    from gemma_pack.console import ProgressTask, Reporter
    from gemma_pack.evaluation.engines.reading import Reader

ANSWER_TOKENS: Final = 256
"""Of a generated answer, where the task does not say; the harness's own default."""
ANSWERED_AT_ONCE: Final = 16
LONGEST_TOKENS: Final = 8192
"""Of a request, if the model reads more."""
SEED: Final = 1234
"""Of the choice of examples; the harness's own default."""


class GemmaLM(LM):  # type: ignore[misc]  # the harness has no types
    """A Reader as the harness sees a model."""

    def __init__(self, reader: Reader, tokenizer: Tokenizer, bos: int, max_length: int, progress: ProgressTask) -> None:
        """Take a reader, its tokenizer, the id of <bos> and the longest sequence, in tokens, that the model reads."""
        super().__init__()
        self._reader = reader
        self._tokenizer = tokenizer
        self._bos = bos
        self._max_length = max_length
        self._progress = progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: FBT001, FBT002 - the harness's signature
        """Return of each (context, continuation) the ln p of the continuation, and whether it is the greedy one."""
        del disable_tqdm
        pairs = [self._encode_pair(*request.args) for request in requests]
        sequences = [[self._bos, *self._fitting(context, len(rest)), *rest] for context, rest in pairs]
        found = []
        for (_, rest), reading in zip(pairs, self._read(sequences), strict=True):
            last = reading.last(len(rest))
            found.append((-float(last.nll.sum(dtype="float64")), bool((last.top1 == last.ids).all())))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: FBT001, FBT002 - the harness's signature
        """Return the ln p of each text, read in disjoint windows that each begin with <bos>."""
        del disable_tqdm
        windows: list[list[int]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self._encode(request.args[0])
            for begin in range(0, len(ids), self._max_length - 1):
                windows.append([self._bos, *ids[begin : begin + self._max_length - 1]])
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, reading in zip(owners, self._read(windows), strict=True):
            sums[owner] -= float(reading.nll.sum(dtype="float64"))
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: FBT001, FBT002 - the harness's signature
        """Return the greedy answer to each context, cut where the task's first stop string begins."""
        del disable_tqdm
        answers = []
        for begin in range(0, len(requests), ANSWERED_AT_ONCE):
            few = [request.args for request in requests[begin : begin + ANSWERED_AT_ONCE]]
            limit = max(_limit(settings) for _, settings in few)
            prompts = [[self._bos, *self._fitting(self._encode(context), limit)] for context, _ in few]
            for answer, (_, settings) in zip(self._reader.answers(prompts, limit), few, strict=True):
                text = self._tokenizer.decode(list(answer.tokens[: _limit(settings)]), skip_special_tokens=True)
                answers.append(_cut(text, settings.get("until") or ()))
                self._progress.advance()
        return answers

    def _read(self, sequences: Sequence[Sequence[int]]) -> list[Any]:
        return self._reader.read(sequences, 1, lambda *_: self._progress.advance())

    def _encode(self, text: str) -> list[int]:
        """Return the ids of `text` without any <bos>, which a chat template may have written into it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [token for token in ids if token != self._bos]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both as one text, so that tokens are those of the whole; white space goes with what follows it."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self._encode(stripped)
        return before, self._encode(stripped + continuation)[len(before) :]

    def _fitting(self, context: Sequence[int], following: int) -> Sequence[int]:
        """Return the end of `context` that fits with <bos> before it and `following` tokens after it."""
        return context[-max(1, self._max_length - 1 - following) :]


def run_task(
    name: str,
    loaded: dict[str, Any],
    reader: Reader,
    tokenizer: Tokenizer,
    bos: int,
    *,
    shots: int | None,
    limit: int | None,
    reporter: Reporter,
) -> TaskScores:
    """Run a task, or all of a group, that the harness's TaskManager has `loaded`, and return each item's scores."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        if shots is not None:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    with reporter.progress(f"Asking the {reader.role}: {name}", None) as progress, _silence():
        lm = GemmaLM(reader, tokenizer, bos, min(reader.max_length, LONGEST_TOKENS), progress)
        found = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, confirm_run_unsafe_code=True)
    return _collect(name, found, limit)


def _collect(name: str, found: dict[str, Any], limit: int | None) -> TaskScores:
    """Return the items of all members, pooled by metric and filter; what is no number of an item is left out."""
    scores: dict[tuple[str, str], dict[str, float]] = {}
    directions: dict[str, bool] = {}
    prompts = hashlib.sha256()
    for member, samples in sorted(found["samples"].items()):
        for sample in sorted(samples, key=lambda sample: (sample["filter"], sample["doc_id"])):
            prompts.update(f"{member} {sample['doc_id']} {sample['prompt_hash']}\n".encode())
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, (bool, int, float)) or getattr(value, "shape", None) == ():
                    items = scores.setdefault((metric, sample["filter"]), {})
                    items[f"{member}/{sample['doc_id']}"] = float(value)
        directions |= found["higher_is_better"].get(member, {})
    shots = max(found["n-shot"].get(member, 0) for member in found["samples"])
    return TaskScores(
        task=name,
        limit=limit,
        prompts_sha256=prompts.hexdigest(),
        metrics=tuple(
            ItemScores(
                metric=metric,
                filter=filtered,
                higher_is_better=directions.get(metric) is not False,
                shots=shots,
                scores=items,
            )
            for (metric, filtered), items in sorted(scores.items())
        ),
    )


def _limit(settings: dict[str, Any]) -> int:
    """Return the most tokens of an answer; sampled answers are refused, because they cannot be paired."""
    if settings.get("do_sample") and settings.get("temperature", 1):
        raise InvalidUsageError(
            "a task samples its answers, and only greedy ones can be compared item by item",
            hint="set do_sample: false in the task's generation_kwargs",
        )
    return int(settings.get("max_gen_toks") or ANSWER_TOKENS)


def _cut(text: str, until: str | Sequence[str]) -> str:
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.partition(stop)[0]
    return text


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the harness's bars and notes out of our output."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
