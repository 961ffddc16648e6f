from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_pack.errors import QuantizationError
from gemma_pack.quantization.packing import pack, unpack
from gemma_pack.quantization.rounding import round_group
from gemma_pack.quantization.scheme import quantization_scheme
from gemma_pack.recipe import Gptq, Recipe, parse_recipe
from tests.quantization.conftest import RECIPE
from tests.quantization.test_input_statistics import correlated_inputs, statistics_of

GPTQ = parse_recipe(RECIPE, origin="tiny.yaml")
PLAIN = Gptq(sink_share=0)  # random inputs have no <bos>
NEAREST = GPTQ.model_copy(update={"algorithm": "nearest"})
SCHEMES = ["W4A16", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4"]


def arguments(recipe: Recipe = GPTQ) -> object:
    return quantization_scheme(recipe).weights


def of_scheme(scheme: str, algorithm: str) -> Recipe:
    return GPTQ.model_copy(update={"scheme": scheme, "group_size": None, "algorithm": algorithm, "gptq": PLAIN})


def random_weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptq_reproduces_the_output_better_than_rounding_to_nearest(scheme: str) -> None:
    inputs = correlated_inputs(2000, 256)
    weight = random_weight(128, 256)
    results = {}
    for algorithm in ("nearest", "gptq"):
        recipe = of_scheme(scheme, algorithm)
        rounded = round_group([weight], arguments(recipe), statistics_of(inputs), recipe)[0]
        results[algorithm] = float(((rounded.weight - weight.float()) @ inputs.float().T).square().mean())
    assert results["gptq"] < 0.6 * results["nearest"]


@pytest.mark.parametrize("algorithm", ["nearest", "gptq"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_is_what_was_rounded(scheme: str, algorithm: str) -> None:
    recipe = of_scheme(scheme, algorithm)
    whole = quantization_scheme(recipe)
    weights = [random_weight(256, 256), random_weight(128, 256, seed=2)]
    for index, linear in enumerate(
        round_group(weights, whole.weights, statistics_of(correlated_inputs(1000, 256)), recipe)
    ):
        stored = pack(f"layer.{index}", linear, whole)
        assert all(name.startswith(f"layer.{index}.") for name in stored)
        served = unpack(f"layer.{index}", stored, whole)
        assert served.dtype == torch.bfloat16
        assert served.shape == weights[index].shape
        assert torch.allclose(served.float(), linear.weight, rtol=2**-7, atol=0)
        error = (served.float() - weights[index].float()).square().mean() / weights[index].float().square().mean()
        assert float(error) < {"W4A16": 0.03, "NVFP4": 0.03}.get(scheme, 0.003)


@settings(max_examples=10, deadline=None)
@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_layers_that_share_an_input_come_out_as_each_would_alone(rows: list[int], seed: int) -> None:
    inputs = correlated_inputs(400, 64, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(count, 64, generator=generator).to(torch.bfloat16) for count in rows]
    together = round_group(weights, arguments(), statistics_of(inputs), GPTQ)
    for weight, linear in zip(weights, together, strict=True):
        alone = round_group([weight], arguments(), statistics_of(inputs), GPTQ)[0]
        assert torch.equal(alone.weight, linear.weight)
        assert torch.equal(alone.scale, linear.scale)


def test_nvfp4_layers_that_a_server_fuses_share_their_global_scale() -> None:
    recipe = of_scheme("NVFP4", "gptq")
    weights = [random_weight(64, 256), 10 * random_weight(64, 256, seed=2)]
    first, second = round_group(weights, arguments(recipe), statistics_of(correlated_inputs(500, 256)), recipe)
    assert first.global_scale is not None
    assert torch.equal(first.global_scale, second.global_scale)


@pytest.mark.parametrize("algorithm", ["nearest", "gptq"])
def test_fp8_layers_that_a_server_fuses_are_not_rounded_anew(algorithm: str) -> None:
    """vLLM's `requantize_with_max_scale` multiplies each layer by its scale, and divides by the largest of them."""
    recipe = of_scheme("FP8", algorithm)
    weights = [random_weight(64, 256), random_weight(64, 256, seed=2) / 10]
    linears = round_group(weights, arguments(recipe), statistics_of(correlated_inputs(500, 256)), recipe)
    largest = torch.stack([linear.scale.float() for linear in linears]).max()
    for linear in linears:
        codes = (linear.weight / linear.scale.float()).to(torch.float8_e4m3fn)
        anew = (codes.float() * linear.scale.float() / largest).to(torch.float8_e4m3fn)
        assert torch.equal(anew.float(), codes.float())


def test_codes_and_scales_are_in_the_range_of_the_format() -> None:
    weight = random_weight(32, 128, seed=3)
    linear = round_group([weight], arguments(), statistics_of(correlated_inputs(500, 128)), GPTQ)[0]
    assert linear.scale.dtype == torch.bfloat16
    assert linear.scale.shape == (32, 2)
    codes = linear.weight.view(32, 2, 64) / linear.scale.float()[..., None]
    assert float((codes - codes.round()).abs().max()) < 8 * 2**-8  # a server multiplies in bfloat16
    assert -8 <= round(float(codes.min())) <= round(float(codes.max())) <= 7


def test_inputs_that_are_not_finite_stop_the_run() -> None:
    inputs = correlated_inputs(100, 64)
    inputs[3, 5] = float("inf")
    with pytest.raises(QuantizationError, match="not finite"):
        round_group([torch.ones(4, 64, dtype=torch.bfloat16)], arguments(), statistics_of(inputs), GPTQ)
