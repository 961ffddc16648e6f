"""Likelihood and divergence of whole distributions, read in blocks of any size, against the textbook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_pack.evaluation import distributions
from gemma_pack.evaluation.distributions import _compare_whole, compare_heads, mean_nll, soft_capped_
from gemma_pack.evaluation.engines.in_process import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def textbook(base: torch.Tensor, variant: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    log_p, log_q = base.double().log_softmax(-1), variant.double().log_softmax(-1)
    at = targets[:, None]
    return [
        -log_p.gather(1, at)[:, 0],
        -log_q.gather(1, at)[:, 0],
        (log_p.exp() * (log_p - log_q)).sum(-1),
        (log_q.exp() - log_p.exp()).gather(1, at)[:, 0],
        base.argmax(-1),
        variant.argmax(-1),
    ]


@dataclass(frozen=True)
class Given:
    """A head whose products are its hidden states, which are bfloat16 numbers."""

    vocabulary_size: int
    soft_cap: float | None = None

    def products(self, hidden: torch.Tensor, part: slice, room: torch.Tensor) -> torch.Tensor:
        some = hidden[:, part]
        return room[: some.numel()].view(some.shape).copy_(some)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return soft_capped_(hidden.float(), self.soft_cap)


def compare(
    base: torch.Tensor, variant: torch.Tensor, targets: torch.Tensor, soft_cap: float | None = None
) -> tuple[torch.Tensor, ...]:
    head = Given(base.shape[1], soft_cap)
    return compare_heads(head, head, base, variant, targets)  # type: ignore[arg-type]


def set_block(patch: pytest.MonkeyPatch, *, tokens: int, block: int) -> None:
    """Let so many ids of the vocabulary be read at once, of so many tokens."""
    patch.setattr(distributions, "CACHED_BYTES", 2 * tokens * block)


def assert_scores(found: tuple[torch.Tensor, ...], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.double() == pytest.approx(theirs.double(), rel=1e-4, abs=2e-4)
    assert bool((found[2] >= 0).all())


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.01, 30),
    distance=st.floats(0, 30),
    offset=st.floats(-100, 100),
    block=st.integers(1, 700),
    soft_cap=st.sampled_from([None, 30.0]),
)
def test_scores_are_the_textbooks(
    seed: int, scale: float, distance: float, offset: float, block: int, soft_cap: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = (scale * torch.randn(5, 600, generator=generator)).bfloat16()
    variant = (base + distance * torch.randn(5, 600, generator=generator) + offset).bfloat16()
    targets = torch.randint(600, (5,), generator=generator)
    head = Given(600, soft_cap)
    expected = textbook(head.logits(base), head.logits(variant), targets)
    with pytest.MonkeyPatch.context() as patch:
        set_block(patch, tokens=5, block=block)
        assert_scores(compare(base, variant, targets, soft_cap), expected)
    few = 2 * 4 * head.vocabulary_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributions, "DEVICE_BYTES", few)
        nll_base, nll_variant, kl, *tops = _compare_whole(head, head, base, variant, targets)  # type: ignore[arg-type]
    delta_p = (-nll_variant).exp() - (-nll_base).exp()
    assert_scores((nll_base, nll_variant, kl.clamp(min=0), delta_p, *tops), expected)


@pytest.mark.parametrize("rising", [1.0, -1.0])
def test_each_block_may_raise_the_highest_logit_by_any_amount(monkeypatch: pytest.MonkeyPatch, rising: float) -> None:
    set_block(monkeypatch, tokens=2, block=10)
    base = rising * torch.linspace(-3e4, 3e4, 300).expand(2, -1).bfloat16()
    variant = (-base / 3).bfloat16()
    targets = torch.tensor([299, 0])
    for ours, theirs in zip(compare(base, variant, targets), textbook(base, variant, targets), strict=True):
        assert ours.double() == pytest.approx(theirs.double(), rel=1e-5)


@pytest.mark.parametrize("scale", [1, 80])
def test_a_distribution_has_no_divergence_from_itself(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    set_block(monkeypatch, tokens=200, block=77)
    logits = (scale * torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))).bfloat16()
    nll_base, nll_variant, kl, delta_p, base_top1, variant_top1 = compare(logits, logits, torch.arange(200))
    assert torch.equal(nll_base, nll_variant)
    assert torch.equal(base_top1, variant_top1)
    assert not kl.any()
    assert not delta_p.any()


@pytest.mark.parametrize("block", [3, 7])
def test_of_equal_logits_the_first_is_chosen(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    set_block(monkeypatch, tokens=1, block=block)
    logits = torch.tensor([[0.0, 1.0, 5.0, 2.0, 5.0, 5.0, 5.0]]).bfloat16()
    assert int(compare(logits, logits, torch.tensor([3]))[4]) == 2


@pytest.mark.parametrize("damage", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_a_logit_that_is_no_number_shows_in_its_models_likelihood(damage: float, soft_cap: float | None) -> None:
    sound = torch.randn(3, 1000).bfloat16()
    damaged = sound.clone()
    damaged[1, 700] = damage
    nll_base, nll_variant, *_ = compare(sound, damaged, torch.arange(3), soft_cap)
    assert bool(nll_base.isfinite().all())
    assert nll_variant.isfinite().tolist() == [True, False, True]
    nll_base, nll_variant, *_ = compare(damaged, sound, torch.arange(3), soft_cap)
    assert nll_base.isfinite().tolist() == [True, False, True]
    assert bool(nll_variant.isfinite().all())


def test_threads_share_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    set_block(monkeypatch, tokens=7, block=100)
    base, variant = torch.randn(7, 1000).bfloat16(), torch.randn(7, 1000).bfloat16()
    alone = compare(base, variant, torch.arange(7))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for ours, others in zip(compare(base, variant, torch.arange(7)), alone, strict=True):
        assert torch.equal(ours, others)


def test_known_answer() -> None:
    base, variant = torch.tensor([[0.0, 3.0, 0.0]]).bfloat16(), torch.tensor([[3.0, 0.0, 0.0]]).bfloat16()
    nll_base, nll_variant, kl, delta_p, base_top1, variant_top1 = compare(base, variant, torch.tensor([1]))
    total = 2 + np.exp(3)
    assert float(kl) == pytest.approx(3 * (np.exp(3) - 1) / total)
    assert (float(nll_base), float(nll_variant)) == pytest.approx((np.log(total) - 3, np.log(total)))
    assert float(delta_p) == pytest.approx((1 - np.exp(3)) / total)
    assert (int(base_top1), int(variant_top1)) == (1, 0)


def test_mean_nll_is_the_models_own(tiny_checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "DEVICE_BYTES", 4 * 7 * 1000)
    model = load(tiny_checkpoints("gemma2"), "base", "cpu")  # with a final soft-cap
    rows = torch.randint(10, 500, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model.module(rows).logits[:, :-1].float()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        assert mean_nll(model, rows, scored_from=1) == pytest.approx(float(expected), abs=2e-3)
