"""The fused sums over the vocabulary against sums of numpy in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from gemma_pack.evaluation.fused import SPAN, Sums, add_block, no_sums

if TYPE_CHECKING:
    import numpy.typing as npt

    Doubles = npt.NDArray[np.float64]


def bits(logits: Doubles) -> tuple[npt.NDArray[np.int16], Doubles]:
    """Return the bits of the nearest bfloat16 numbers, and these numbers."""
    rounded = torch.from_numpy(logits).bfloat16()
    return rounded.view(torch.int16).numpy(), rounded.double().numpy()


def add(
    sums: Sums, base: Doubles, variant: Doubles, soft_caps: tuple[float | None, float | None] = (None, None)
) -> None:
    add_block(soft_caps, 0, bits(base)[0], bits(variant)[0], sums)


@pytest.mark.parametrize("soft_caps", [(None, None), (30.0, 30.0), (None, 50.0)])
def test_sums_are_those_of_the_shifted_logits(soft_caps: tuple[float | None, float | None]) -> None:
    generator = np.random.default_rng(0)
    shape = 6, 3 * SPAN + 5
    scale = np.array([0.1, 1, 5, 20, 60, 200])[:, None]  # the last two leave an origin of 0
    (x_bits, x), (y_bits, y) = (
        bits(scale * generator.standard_normal(shape)),
        bits(scale * generator.standard_normal(shape)),
    )
    sums = no_sums(np.arange(6))
    add_block(soft_caps, 0, x_bits[:, :700], y_bits[:, :700], sums)
    add_block(soft_caps, 700, x_bits[:, 700:], y_bits[:, 700:], sums)
    x, y = (z if cap is None else cap * np.tanh(z / cap) for z, cap in zip((x, y), soft_caps, strict=True))
    for which, z in enumerate((x, y)):
        highest = z.max(-1)
        shifted = z - sums.origin[:, which, None]
        assert (np.abs(highest - sums.origin[:, which]) <= 40).all()
        assert sums.highest[:, which] == pytest.approx(highest, abs=2e-5)
        assert sums.target[:, which] == pytest.approx(z[np.arange(6), np.arange(6)], abs=2e-5)
        assert sums.total[:, which] == pytest.approx(np.exp(shifted).sum(-1), rel=2e-5)
        assert z[np.arange(6), sums.top1[:, which]] == pytest.approx(highest, abs=2e-5)
    x, y = x - sums.origin[:, :1], y - sums.origin[:, 1:]
    terms = np.exp(x) * (x - y)
    assert (np.abs(sums.weighted - terms.sum(-1)) <= 2e-5 * np.abs(terms).sum(-1)).all()


def test_an_origin_of_zero_is_left_where_it_is() -> None:
    sums = no_sums(np.zeros(1, np.int64))
    add(sums, np.array([[-39.0, 1.0, 39.0]]), np.array([[-39.0, -38.5, -37.0]]))
    assert not sums.origin.any()


@pytest.mark.parametrize("logit", [41.0, -41.0])
def test_logits_far_from_zero_move_the_origin(logit: float) -> None:
    sums = no_sums(np.zeros(1, np.int64))
    add(sums, np.array([[logit, logit - 1]]), np.array([[0.0, 1.0]]))
    assert sums.origin.tolist() == [[logit, 0.0]]
    assert sums.total[0, 0] == pytest.approx(1 + np.exp(-1))


def test_what_a_part_of_the_tokens_adds_is_in_the_whole() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 20))
    whole, split = no_sums(np.arange(5)), no_sums(np.arange(5))
    add(whole, logits, -logits)
    for rows, sums in zip(np.array_split(logits, 3), split.split(3), strict=True):
        add(sums, rows, -rows)
    assert all((ours == others).all() for ours, others in zip(split, whole, strict=True))
