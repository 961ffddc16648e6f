from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_pack.quantization.scales import choose_scale, signed_factors, signed_scale
from gemma_pack.quantization.scheme import quantization_scheme
from tests.quantization.test_rounding import of_scheme

GROUP = 32


def rounded(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and weights of [groups, GROUP] by scales [groups]."""
    half = 1 << (bits - 1)
    codes = (weight / scale.float()[:, None]).round().clamp(-half, half - 1)
    return codes, codes * scale.float()[:, None]


def squares(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (rounded(weight, scale, bits)[1] - weight).square().sum(-1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([4, 8]), extreme=st.sampled_from([-1.0, 1.0, 0.0]))
def test_no_positive_scale_of_the_grid_has_less_error(seed: int, bits: int, extreme: float) -> None:
    weight = torch.randn(16, GROUP, generator=torch.Generator().manual_seed(seed))
    if extreme:
        weight[:, 3] = 4 * extreme
    mine = squares(weight, signed_scale(weight, GROUP, bits)[:, 0], bits)
    largest = weight.abs().amax(-1)
    for factor in signed_factors(bits):
        if factor > 0:
            theirs = squares(weight, (largest * factor).to(torch.bfloat16), bits)
            assert (mine <= theirs * (1 + 1e-4)).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([4, 8]))
def test_no_scale_of_the_grid_has_less_error_as_the_columns_count_it(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 3 * GROUP, generator=generator)
    costs = torch.rand(3 * GROUP, generator=generator).square() + 1e-3
    groups, counted = weight.view(-1, GROUP), costs.view(1, 3, GROUP)

    def cost(scale: torch.Tensor) -> torch.Tensor:
        off = rounded(groups, scale, bits)[1] - groups
        return (off.view(8, 3, GROUP).square() * counted).sum(-1).flatten()

    mine = cost(signed_scale(weight, GROUP, bits, costs).flatten())
    for factor in signed_factors(bits):
        assert (mine <= cost((groups.abs().amax(-1) * factor).to(torch.bfloat16)) * (1 + 1e-4)).all()
    alike = signed_scale(weight, GROUP, bits, torch.full_like(costs, 7.0))
    assert torch.equal(alike, signed_scale(weight, GROUP, bits))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_extreme_of_a_group_takes_the_outermost_code(sign: float) -> None:
    weight = torch.linspace(-3, 3, GROUP)[None].repeat(4, 1)
    weight[:, 9] = 4.1 * sign
    scale = signed_scale(weight, GROUP, 4)[:, 0]
    codes, _ = rounded(weight, scale, 4)
    assert (scale.sign() == -sign).all()
    assert (codes[:, 9] == -8).all()


def test_both_signs_are_used_and_the_error_falls_below_upstreams() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    recipe = of_scheme("W4A16", "nearest").model_copy(update={"group_size": GROUP})
    arguments = quantization_scheme(recipe).weights
    signed = choose_scale(weight, arguments, "signed_mse")[0].flatten()
    upstream = choose_scale(weight, arguments, "memoryless_mse")[0].flatten()
    groups = weight.view(-1, GROUP)
    assert 0.4 < float((signed < 0).double().mean()) < 0.6
    assert float(squares(groups, signed, 4).sum()) < 0.95 * float(squares(groups, upstream, 4).sum())


def test_groups_of_zeros_and_of_tiny_weights_have_scales_that_divide() -> None:
    weight = torch.zeros(3, GROUP)
    weight[1] = 1e-37
    weight[2, 5] = -1e-30
    scale = signed_scale(weight, GROUP, 4)[:, 0]
    codes, made = rounded(weight, scale, 4)
    assert (scale != 0).all()
    assert torch.isfinite(codes).all()
    assert torch.allclose(made, weight, rtol=0.1, atol=1e-37)
