"""Scores every token of every window under base and variant at once: likelihood and divergence.

Each worker takes a few windows through both decoders; what the heads make of the hidden states is `distributions.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gemma_pack.errors import MachineError
from gemma_pack.evaluation.distributions import TOKENS_AT_ONCE, compare_states, mean_nll
from gemma_pack.evaluation.workers import window_workers
from gemma_pack.report import BosCheck, KernelNoise, NoiseFloor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from torch import Tensor

    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.distributions import Scorable
    from gemma_pack.evaluation.engines.in_process import Model

    Floats = npt.NDArray[np.float32]

DECODER_TOKENS: Final = 1024
"""Tokens in one forward pass of the decoder; what it computes of so many stays small beside the weights."""
NOISE_WINDOWS: Final = 4
"""Windows, at least, that the noise floor is measured on."""
BOS_GAIN: Final = 0.9
"""With <bos> the perplexity is below so much of that without. One more token of text before the rest gains a percent or
two, so windows that have lost their <bos> do not pass; with it Gemma 3 270M's is 0.3 of that without."""
BOS_WINDOWS: Final = 2
"""Windows that the check of <bos> reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What both models made of each scored token; all arrays are [windows, sequence_length - 1].

    `nll_*` are -ln p of the token that was read, `kl_nats` is KL(base || variant) of the whole distribution, `delta_p`
    is p_variant - p_base of the token that was read (all float32). `base_top1` and `variant_top1` are int32 ids.
    Where an engine shows but the most likely tokens, `kl_nats` is a lower bound and `kl_rest_nats` what is
    estimated of the rest (`top_k.py`); None where the whole distribution was seen.
    """

    nll_base: Floats
    nll_variant: Floats
    kl_nats: Floats
    delta_p: Floats
    base_top1: npt.NDArray[np.int32]
    variant_top1: npt.NDArray[np.int32]
    kl_rest_nats: Floats | None = None

    @property
    def kl_all_nats(self) -> Floats:
        """The KL whose mean counts: of a single token an estimate where there is a rest."""
        return self.kl_nats if self.kl_rest_nats is None else self.kl_nats + self.kl_rest_nats

    @property
    def same_top1(self) -> npt.NDArray[np.bool_]:
        """Whether both rank the same token first."""
        same: npt.NDArray[np.bool_] = self.base_top1 == self.variant_top1
        return same

    def window(self, place: int) -> TokenScores:
        """Return the scores of one window, its arrays still [1, sequence_length - 1]."""
        return _each(lambda columns: columns[0][place : place + 1], [self])


def join_scores(parts: Sequence[TokenScores]) -> TokenScores:
    """Return the scores of all windows of `parts`, in their order."""
    return _each(np.concatenate, parts)


def _each(of: Callable[[list[Any]], Any], parts: Sequence[TokenScores]) -> TokenScores:
    """Return the scores that `of` makes of each column of all `parts`."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(TokenScores)}
    made: dict[str, Any] = {name: None if column[0] is None else of(column) for name, column in columns.items()}
    return TokenScores(**made)


def score(base: Scorable, variant: Scorable, ids: npt.NDArray[np.int32], reporter: Reporter) -> TokenScores:
    """Score every token after <bos> of the windows `ids`, int32 [windows, sequence_length], under both models.

    Where the device runs out of memory, fewer windows are read at once.

    Raises:
        QuantizationError: a model computes NaN or infinity; the message names which, and where.
        MachineError: not even one window fits into memory.
    """
    import torch

    windows, length = ids.shape
    tokens = torch.from_numpy(ids.astype(np.int64))
    floats = [np.empty((windows, length - 1), np.float32) for _ in range(4)]
    firsts = [np.empty((windows, length - 1), np.int32) for _ in range(2)]
    begin = 0
    with window_workers(base.device) as workers, reporter.progress("Scoring windows", windows) as task:
        share = max(1, min(TOKENS_AT_ONCE // length, -(-windows // workers.count)))
        while begin < windows:
            shares = torch.split(tokens[begin : begin + workers.count * share], share)
            try:
                scored = workers.map(lambda rows: _score_rows(base, variant, rows), shares)
            except torch.OutOfMemoryError as error:
                share = _smaller(share, error)
                reporter.warn(f"out of memory; going on with {share} windows at once")
                continue
            for rows, values in zip(shares, scored, strict=True):
                for target, column in zip([*floats, *firsts], values, strict=True):
                    target[begin : begin + len(rows)] = column.reshape(len(rows), -1).cpu().numpy()
                task.advance(len(rows))
                begin += len(rows)
    return TokenScores(
        nll_base=floats[0],
        nll_variant=floats[1],
        kl_nats=floats[2],
        delta_p=floats[3],
        base_top1=firsts[0],
        variant_top1=firsts[1],
    )


def _score_rows(base: Scorable, variant: Scorable, rows: Tensor) -> tuple[Tensor, ...]:
    """Return the columns of scores of int64 rows [batch, length], each [tokens]."""
    import torch

    batches = torch.split(rows, batch_windows(rows.shape[1]))
    states = [torch.cat([model.hidden(batch) for batch in batches]) for model in (base, variant)]
    return compare_states(states, base, variant, rows)


def batch_windows(length: int) -> int:
    """Return how many windows of `length` tokens go through the decoder at once."""
    return max(1, DECODER_TOKENS // length)


def measure_noise(base: Model, ids: npt.NDArray[np.int32]) -> NoiseFloor:
    """Return how far the base is from itself when windows are read in batches of another size, or by another kernel.

    `ids` is int32 [windows, sequence_length]; the first few are read.
    """
    import torch

    usual = batch_windows(ids.shape[1])
    other = 1 if usual > 1 else 2
    rows = torch.from_numpy(ids[: max(usual, NOISE_WINDOWS)].astype(np.int64))

    def states(batch: int) -> Tensor:
        return torch.cat([base.hidden(few) for few in torch.split(rows, batch)])

    def distance(first: Tensor, second: Tensor) -> dict[str, float]:
        nll, again, kl, _, top1, top1_again = compare_states([first, second], base, base, rows)
        return {
            "kl_nats": float(kl.double().mean()),
            "same_top1": float((top1 == top1_again).double().mean()),
            "ln_ratio": float((again - nll).double().mean()),
        }

    kernel = None
    with torch.inference_mode():
        expected = states(usual)
        if base.other_attention:
            with base.attending(base.other_attention):
                by_kernel = states(usual)
            kernel = KernelNoise(attention=base.other_attention, **distance(expected, by_kernel))
        return NoiseFloor(windows=len(rows), batch=other, kernel=kernel, **distance(expected, states(other)))


def check_bos(base: Model, ids: npt.NDArray[np.int32]) -> BosCheck:
    """Return the base's perplexity on the same tokens with <bos> in front and without it.

    Raises:
        MachineError: <bos> does not help, so the baseline itself is broken and no comparison with it means anything.
    """
    import torch

    with torch.inference_mode():
        tokens = torch.from_numpy(ids[:BOS_WINDOWS].astype(np.int64))
        with_bos = mean_nll(base, tokens, scored_from=2)
        without_bos = mean_nll(base, tokens[:, 1:], scored_from=1)
    return judge_bos(with_bos, without_bos)


def judge_bos(with_bos: float, without_bos: float) -> BosCheck:
    """Return the base's perplexities from its mean -ln p of the same tokens with <bos> in front and without it.

    Raises:
        MachineError: <bos> does not help, so the baseline itself is broken.
    """
    check = BosCheck(with_bos=float(np.exp(with_bos)), without_bos=float(np.exp(without_bos)))
    if not check.with_bos < BOS_GAIN * check.without_bos:
        raise MachineError(
            f"the baseline is broken: the base's perplexity is {check.with_bos:.4g} with <bos> in front and "
            f"{check.without_bos:.4g} without it, and a Gemma reads far better with it",
            hint="check that the base is a trained Gemma with its own tokenizer, and that transformers is not altered",
        )
    return check


def _smaller(batch: int, error: Exception) -> int:
    if batch == 1:
        raise MachineError(
            "the device runs out of memory with a single window", hint="use --profile smoke, or a larger device"
        ) from error
    return batch // 2
