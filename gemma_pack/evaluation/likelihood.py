"""Scores every token of every window under base and variant at once: likelihood and divergence.

The vocabulary is large (262,144), so logits are never held for a whole window: the decoders' hidden states are,
and the heads run over a few tokens at a time, with everything after them in float32 and in place.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from gemma_pack.errors import MachineError
from gemma_pack.report import BosCheck, KernelNoise, NoiseFloor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt
    import torch
    from torch import Tensor

    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.engines.in_process import Model

    Floats = npt.NDArray[np.float32]

BATCH_TOKENS: Final = 2048
"""Tokens in one forward pass of the decoder; hidden states and attention of so many stay small beside the weights."""
HEAD_TOKENS: Final = 256
"""Tokens that the heads run over at once: enough for a fast product, 0.27 GB of bf16 logits for both models."""
CACHED_BYTES: Final = 4 << 20
"""Float32 logits of one model to compare at once on a CPU. The comparison passes over them ten times, so they should
stay in its cache: four times as fast on two cores as 160 tokens at once."""
DEVICE_BYTES: Final = 128 << 20
"""The same elsewhere."""
NOISE_WINDOWS: Final = 4
"""Windows, at least, that the noise floor is measured on."""
BOS_GAIN: Final = 0.9
"""With <bos> the perplexity is below so much of that without. One more token of text before the rest gains a percent or
two, so windows that have lost their <bos> do not pass; with it Gemma 3 270M's is 0.3 of that without."""
BOS_WINDOWS: Final = 2
"""Windows that the check of <bos> reads."""


class Scorable(Protocol):
    """What scoring asks of a model; `engines.in_process.Model` says what each does."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def hidden(self, ids: Tensor) -> Tensor:
        """Return last hidden states."""

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits before the final soft-cap."""

    def finish(self, head: Tensor) -> Tensor:
        """Return logits in float32 after it."""

    def fail_not_finite(self, ids: Tensor) -> None:
        """Raise QuantizationError."""


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
    batch = batch_windows(length)
    tokens = torch.from_numpy(ids.astype(np.int64))
    floats = [np.empty((windows, length - 1), np.float32) for _ in range(4)]
    firsts = [np.empty((windows, length - 1), np.int32) for _ in range(2)]
    begin = 0
    with torch.inference_mode(), reporter.progress("Scoring windows", windows) as task:
        while begin < windows:
            rows = tokens[begin : begin + batch]
            try:
                scored = compare_states([model.hidden(rows) for model in (base, variant)], base, variant, rows)
            except torch.OutOfMemoryError as error:
                batch = _smaller(batch, error)
                reporter.warn(f"out of memory; going on with {batch} windows at once")
                continue
            for target, values in zip([*floats, *firsts], scored, strict=True):
                target[begin : begin + len(rows)] = values.reshape(len(rows), -1).cpu().numpy()
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


def batch_windows(length: int) -> int:
    """Return how many windows of `length` tokens are scored at once."""
    return max(1, BATCH_TOKENS // length)


def measure_noise(base: Model, ids: npt.NDArray[np.int32]) -> NoiseFloor:
    """Return how far the base is from itself when windows are read in batches of another size, or by another kernel.

    `ids` is int32 [windows, sequence_length]; the first few are read.
    """
    import torch

    usual = batch_windows(ids.shape[1])
    other = 1 if usual > 1 else 2
    rows = torch.from_numpy(ids[: max(usual, NOISE_WINDOWS)].astype(np.int64))

    def states(batch: int) -> Tensor:
        return torch.cat([base.hidden(rows[part]) for part in _slices(0, len(rows), batch)])

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
        with_bos = _mean_nll(base, tokens, scored_from=2)
        without_bos = _mean_nll(base, tokens[:, 1:], scored_from=1)
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


def compare_states(hidden: list[Tensor], base: Scorable, variant: Scorable, rows: Tensor) -> tuple[Tensor, ...]:
    """Return nll_base, nll_variant, kl, delta_p, base_top1, variant_top1, each [tokens].

    `hidden` holds the last hidden states of both for the int64 rows [batch, length].
    """
    import torch

    hidden = [states[:, :-1].flatten(0, 1) for states in hidden]
    targets = rows[:, 1:].flatten().to(base.device)
    count = len(targets)
    scored = (*torch.empty((4, count), device=base.device), *torch.empty((2, count), device=base.device).int())
    for part in _slices(0, count, HEAD_TOKENS):
        heads = base.head(hidden[0][part]), variant.head(hidden[1][part])
        for few in _slices(part.start, part.stop, _tokens_at_once(heads[0])):
            inside = slice(few.start - part.start, few.stop - part.start)
            values = compare_logits(base.finish(heads[0][inside]), variant.finish(heads[1][inside]), targets[few])
            for column, value in zip(scored, values, strict=True):
                column[few] = value
    for model, nll in ((base, scored[0]), (variant, scored[1])):
        if not bool(torch.isfinite(nll).all()):
            model.fail_not_finite(rows)
    return scored


def compare_logits(base: Tensor, variant: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return nll_base, nll_variant, kl, delta_p, base_top1 and variant_top1, each [tokens].

    `base` and `variant` are float32 logits [tokens, vocabulary] and are overwritten; `targets` int64 [tokens].
    With z the logits and Z = ln Σ exp z: KL = Σ p_b (z_b - z_v) - Z_b + Z_v. Rounding can take it a hair below 0,
    where no KL is; it is set to 0 there.
    """
    import torch

    column = targets[:, None]
    base_top, base_top1 = base.max(-1)
    _, variant_top1 = variant.max(-1)  # argmax alone takes three times as long
    variant_z = torch.logsumexp(variant, -1)
    nll_variant = variant_z - variant.gather(1, column)[:, 0]
    base_target = base.gather(1, column)[:, 0]
    difference = variant.neg_().add_(base)
    weights = base.sub_(base_top[:, None]).exp_()
    total = weights.sum(-1)
    base_z = base_top + total.log()
    nll_base = base_z - base_target
    kl = torch.linalg.vecdot(weights, difference) / total - base_z + variant_z
    delta_p = (-nll_variant).exp() - (-nll_base).exp()
    return nll_base, nll_variant, kl.clamp_(min=0), delta_p, base_top1.int(), variant_top1.int()


def _mean_nll(model: Model, rows: Tensor, *, scored_from: int) -> float:
    """Return the mean -ln p of the tokens at `scored_from` and after, of int64 rows [batch, length]."""
    import torch

    hidden = model.hidden(rows)[:, scored_from - 1 : -1].flatten(0, 1)
    targets = rows[:, scored_from:].flatten().to(model.device)
    losses = torch.empty(len(targets), device=model.device)
    for part in _slices(0, len(targets), HEAD_TOKENS):
        head = model.head(hidden[part])
        for few in _slices(part.start, part.stop, _tokens_at_once(head)):
            logits = model.finish(head[few.start - part.start : few.stop - part.start])
            losses[few] = torch.nn.functional.cross_entropy(logits, targets[few], reduction="none")
    if not bool(torch.isfinite(losses).all()):
        model.fail_not_finite(rows)
    return float(losses.double().mean())


def _smaller(batch: int, error: Exception) -> int:
    if batch == 1:
        raise MachineError(
            "the device runs out of memory with a single window", hint="use --profile smoke, or a larger device"
        ) from error
    return batch // 2


def _tokens_at_once(head: Tensor) -> int:
    budget = CACHED_BYTES if head.device.type == "cpu" else DEVICE_BYTES
    return max(1, budget // (4 * head.shape[-1]))


def _slices(begin: int, end: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, end)) for start in range(begin, end, step))
