from __future__ import annotations

import pytest
import torch
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

from gemma_pack.errors import QuantizationError
from gemma_pack.quantization.gptq import factorize, gptq
from gemma_pack.quantization.rounding import round_group
from gemma_pack.quantization.scales import choose_scale
from gemma_pack.quantization.scheme import quantization_scheme
from tests.quantization.test_input_statistics import correlated_inputs, statistics_of
from tests.quantization.test_rounding import of_scheme, random_weight


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8", "NVFP4"])
def test_the_codes_are_those_of_llm_compressors_kernel(scheme: str) -> None:
    recipe = of_scheme(scheme, "gptq")
    arguments = quantization_scheme(recipe).weights
    weight, statistics = random_weight(64, 256), statistics_of(correlated_inputs(2000, 256))
    costs = factorize(statistics.hessian(0), recipe.gptq.dampening).column_costs()
    scale, global_scale = choose_scale(weight.float(), arguments, recipe.observer, costs)
    theirs = quantize_weight(
        weights=weight.float()[None].clone(),
        hessians=statistics.hessian(0)[None],
        scale=scale.float()[None],  # else its dequantized weights are rounded to the scales' bfloat16
        zero_point=torch.zeros_like(scale, dtype=arguments.zp_dtype)[None],
        global_scale=None if global_scale is None else global_scale.reshape(1),
        quant_args=arguments,
        blocksize=recipe.gptq.block_size,
        percdamp=recipe.gptq.dampening,
    )[0][0]
    ours = round_group([weight], arguments, statistics, recipe)[0].weight
    assert float(torch.isclose(ours, theirs).double().mean()) > 0.999


def test_an_input_that_is_always_zero_leaves_its_weights_rounded_to_nearest() -> None:
    inputs = correlated_inputs(500, 64)
    inputs[:, 7] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    factor = factorize(statistics_of(inputs).hessian(0), 0.01)
    rounded = gptq(weight, torch.full_like(weight, 0.25), factor, torch.round, block=32)
    assert torch.equal(rounded[:, 7], (weight[:, 7] / 0.25).round() * 0.25)


def test_a_hessian_that_is_none_is_refused() -> None:
    with pytest.raises(QuantizationError, match="positive definite"):
        factorize(-torch.eye(4), 0.01)


def test_what_a_column_costs_is_what_gptq_pays_for_its_error() -> None:
    """The loss of a rounded matrix is the sum over columns of the error when their turn came, times their cost."""
    hessian = statistics_of(correlated_inputs(2000, 64)).hessian(0)
    factor = factorize(hessian, 0.01)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    turns: list[torch.Tensor] = []

    def to_quarters(scaled: torch.Tensor) -> torch.Tensor:
        turns.append((scaled - scaled.round()) / 4)
        return scaled.round()

    off = gptq(weight, torch.full_like(weight, 0.25), factor, to_quarters, block=32) - weight
    dampened = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    costs = factor.column_costs()[factor.order]
    paid = (torch.stack(turns, 1).square() * costs).sum()
    assert float(paid) == pytest.approx(float(((off @ dampened) * off).sum()), rel=1e-3)
