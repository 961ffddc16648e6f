"""The numbers in loops of machine code: bfloat16 against torch, the exponential against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_pack.evaluation.machine_code import exponential, rounded, widened


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_floats_are_rounded_as_torch_rounds_them(number: float) -> None:
    nearest = torch.tensor(number, dtype=torch.float32).bfloat16()
    assert int(rounded(np.float32(number))) == int(nearest.view(torch.int16))
    assert float(widened(np.int16(nearest.view(torch.int16)))) == float(nearest)


def test_of_two_as_near_the_even_one_is_taken() -> None:
    assert [float(widened(rounded(np.float32(1 + steps / 256)))) for steps in (1, 3)] == [1.0, 1 + 4 / 256]


def test_what_is_no_number_stays_none() -> None:
    assert math.isnan(widened(rounded(np.float32(math.nan))))
    assert math.isnan(widened(rounded(np.float32(-math.nan))))


@settings(deadline=None)
@given(st.floats(-87, 88, width=32))
def test_exponentials_are_right_to_two_units_in_the_last_place(x: float) -> None:
    exact = np.exp(np.float64(x))
    assert abs(float(exponential(np.float32(x))) - exact) <= 2 * float(np.spacing(np.float32(exact)))


def test_what_is_far_below_counts_for_nothing() -> None:
    assert float(exponential(np.float32(-1e30))) < 2e-38
