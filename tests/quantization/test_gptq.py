from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_pack.errors import QuantizationError
from gemma_pack.quantization.gptq import Hessian, quantize_group
from gemma_pack.quantization.scheme import weight_arguments
from gemma_pack.recipe import Gptq, parse_recipe
from tests.quantization.conftest import RECIPE

ARGUMENTS = weight_arguments(parse_recipe(RECIPE, origin="tiny.yaml"))


def correlated_inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs as a model has them: a few directions carry most of the variance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    return (torch.randn(tokens, columns, generator=generator) @ mixing).to(torch.bfloat16)


def hessian_of(inputs: torch.Tensor) -> Hessian:
    hessian = Hessian(inputs.shape[-1], torch.device("cpu"))
    hessian.add(inputs)
    return hessian


def test_the_hessian_is_twice_the_mean_outer_product() -> None:
    inputs = correlated_inputs(300, 64)
    hessian = Hessian(64, torch.device("cpu"))
    for part in inputs.reshape(3, 100, 64).split(2):
        hessian.add(part)
    exact = 2 * inputs.double().T @ inputs.double() / 300
    assert torch.allclose(hessian.mean().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.max()))


def test_gptq_reproduces_the_output_better_than_rounding_to_nearest() -> None:
    inputs = correlated_inputs(2000, 128)
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    spread = quantize_group([weight], hessian_of(inputs), ARGUMENTS, Gptq())[0]
    identity = Hessian(128, torch.device("cpu"))
    identity.total, identity.tokens = torch.eye(128), 1  # no correlation: GPTQ is then rounding to nearest
    nearest = quantize_group([weight], identity, ARGUMENTS, Gptq())[0]

    def output_error(candidate: torch.Tensor) -> float:
        return float(((candidate.float() - weight.float()) @ inputs.float().T).square().mean())

    assert torch.equal(spread.scale, nearest.scale)
    assert output_error(spread.dequantized(ARGUMENTS)) < 0.5 * output_error(nearest.dequantized(ARGUMENTS))


@settings(max_examples=10, deadline=None)
@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_layers_that_share_an_input_come_out_as_each_would_alone(rows: list[int], seed: int) -> None:
    inputs = correlated_inputs(400, 64, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(count, 64, generator=generator).to(torch.bfloat16) for count in rows]
    together = quantize_group(weights, hessian_of(inputs), ARGUMENTS, Gptq())
    for weight, linear in zip(weights, together, strict=True):
        alone = quantize_group([weight], hessian_of(inputs), ARGUMENTS, Gptq())[0]
        assert torch.equal(alone.codes, linear.codes)
        assert torch.equal(alone.scale, linear.scale)


def test_codes_and_scales_are_in_the_range_of_the_format() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    linear = quantize_group([weight], hessian_of(correlated_inputs(500, 128)), ARGUMENTS, Gptq())[0]
    assert linear.codes.dtype == torch.int8
    assert linear.scale.dtype == torch.bfloat16
    assert linear.scale.shape == (32, 2)
    assert int(linear.codes.min()) >= -8
    assert int(linear.codes.max()) <= 7
    worst = (linear.dequantized(ARGUMENTS).float() - weight.float()).abs().max()
    assert float(worst) < 6 * float(linear.scale.float().max())


def test_inputs_that_are_not_finite_stop_the_run() -> None:
    inputs = correlated_inputs(100, 64)
    inputs[3, 5] = float("inf")
    with pytest.raises(QuantizationError, match="not finite"):
        quantize_group([torch.ones(4, 64, dtype=torch.bfloat16)], hessian_of(inputs), ARGUMENTS, Gptq())
