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
from gemma_pack.evaluation.distributions import compare_heads, mean_nll
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
    """A head whose logits are its hidden states."""

    vocabulary_size: int

    def logits(self, hidden: torch.Tensor, part: slice, out: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        assert room.numel() >= out.numel()
        return out.copy_(hidden[:, part])


def compare(base: torch.Tensor, variant: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    head = Given(base.shape[1])
    return compare_heads(head, head, base, variant, targets)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.01, 30),
    distance=st.floats(0, 30),
    offset=st.floats(-100, 100),
    block=st.integers(1, 400),
)
def test_scores_are_the_textbooks(seed: int, scale: float, distance: float, offset: float, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = scale * torch.randn(5, 300, generator=generator)
    variant = base + distance * torch.randn(5, 300, generator=generator) + offset
    targets = torch.randint(300, (5,), generator=generator)
    expected = textbook(base, variant, targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributions, "CACHED_BYTES", 4 * 5 * block)
        found = compare(base, variant, targets)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.double() == pytest.approx(theirs.double(), rel=1e-4, abs=2e-4)
    assert bool((found[2] >= 0).all())


@pytest.mark.parametrize("rising", [1.0, -1.0])
def test_each_block_may_raise_the_highest_logit_by_any_amount(monkeypatch: pytest.MonkeyPatch, rising: float) -> None:
    monkeypatch.setattr(distributions, "CACHED_BYTES", 4 * 2 * 10)
    base = rising * torch.linspace(-3e4, 3e4, 300).expand(2, -1)
    variant = -base / 3
    targets = torch.tensor([299, 0])
    for ours, theirs in zip(compare(base, variant, targets), textbook(base, variant, targets), strict=True):
        assert ours.double() == pytest.approx(theirs.double(), rel=1e-5)


def test_a_distribution_has_no_divergence_from_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "CACHED_BYTES", 4 * 8 * 77)
    logits = torch.randn(8, 1000)
    nll_base, nll_variant, kl, delta_p, base_top1, variant_top1 = compare(logits, logits, torch.arange(8))
    assert torch.equal(nll_base, nll_variant)
    assert torch.equal(base_top1, variant_top1)
    assert not kl.any()
    assert not delta_p.any()


def test_of_equal_logits_the_first_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "CACHED_BYTES", 4 * 1 * 3)
    logits = torch.tensor([[0.0, 1.0, 5.0, 2.0, 5.0, 5.0, 5.0]])
    assert int(compare(logits, logits, torch.tensor([3]))[4]) == 2


def test_known_answer() -> None:
    base, variant = torch.log(torch.tensor([[0.5, 0.25, 0.25]])), torch.log(torch.tensor([[0.25, 0.5, 0.25]]))
    nll_base, nll_variant, kl, delta_p, base_top1, variant_top1 = compare(base, variant, torch.tensor([1]))
    assert float(kl) == pytest.approx(0.25 * np.log(2))
    assert (float(nll_base), float(nll_variant)) == pytest.approx((np.log(4), np.log(2)))
    assert float(delta_p) == pytest.approx(0.25)
    assert (int(base_top1), int(variant_top1)) == (0, 1)


def test_mean_nll_is_the_models_own(tiny_checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "CACHED_BYTES", 4 * 40 * 100)
    model = load(tiny_checkpoints("gemma2"), "base", "cpu")  # with a final soft-cap
    rows = torch.randint(10, 500, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model.module(rows).logits[:, :-1].float()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        assert mean_nll(model, rows, scored_from=1) == pytest.approx(float(expected), abs=2e-3)
