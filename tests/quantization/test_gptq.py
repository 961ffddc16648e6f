from __future__ import annotations

import subprocess
import sys

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


def one_scale(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 0.25 for each row, and that each column takes it."""
    rows, columns = weight.shape
    return torch.full((rows, 1), 0.25), torch.zeros(columns, dtype=torch.int64)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8", "NVFP4"])
def test_the_codes_are_those_of_llm_compressors_kernel(scheme: str) -> None:
    """Sums in another order move a code now and then, and with it some that follow in its row: many rows are asked."""
    recipe = of_scheme(scheme, "gptq")
    arguments = quantization_scheme(recipe).weights
    weight, statistics = random_weight(1024, 256), statistics_of(correlated_inputs(2000, 256))
    costs = factorize(statistics.hessian(0), recipe.gptq.dampening).column_costs()
    scale, global_scale = choose_scale(weight.float(), arguments, recipe.observer, costs)
    theirs, _, fell_back = quantize_weight(
        weights=weight.float()[None],
        hessians=statistics.hessian(0)[None],
        scale=scale.float()[None],  # else its dequantized weights are rounded to the scales' bfloat16
        zero_point=torch.zeros_like(scale, dtype=arguments.zp_dtype)[None],
        global_scale=None if global_scale is None else global_scale.reshape(1),
        quant_args=arguments,
        blocksize=recipe.gptq.block_size,
        percdamp=recipe.gptq.dampening,
    )
    assert not fell_back.any()
    ours = round_group([weight], arguments, statistics, recipe)[0].weight
    assert float(torch.isclose(ours, theirs[0]).double().mean()) > 0.999


@pytest.mark.parametrize("columns", [1, 40, 512, 1300])
def test_the_factor_is_one_of_the_inverse(columns: int) -> None:
    hessian = statistics_of(correlated_inputs(4000, columns)).hessian(0)
    diagonal = hessian.diagonal().clone()
    dampened = hessian.double() + 0.01 * diagonal.mean() * torch.eye(columns)
    factor = factorize(hessian, 0.01)
    lower = factor.lower.double()
    assert factor.lower.data_ptr() == hessian.data_ptr(), "made in the Hessian's own memory"
    assert torch.equal(lower, lower.tril())
    assert torch.equal(diagonal[factor.order], diagonal.sort().values)
    identity = lower.T @ lower @ dampened[factor.order][:, factor.order]
    torch.testing.assert_close(identity, torch.eye(columns, dtype=torch.float64), atol=1e-3, rtol=0)


def test_an_input_that_is_always_zero_leaves_its_weights_rounded_to_nearest() -> None:
    inputs = correlated_inputs(500, 64)
    inputs[:, 7] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    factor = factorize(statistics_of(inputs).hessian(0), 0.01)
    rounded = gptq(weight, *one_scale(weight), factor, torch.round, block=32)
    assert torch.equal(rounded[:, 7], (weight[:, 7] / 0.25).round() * 0.25)


def test_rounding_takes_no_more_memory_than_is_planned() -> None:
    """Beside weights and statistics: one matrix of the Hessian's size, or four of the weights'."""
    script = """
import resource, torch
from gemma_pack.quantization.input_statistics import InputStatistics
from gemma_pack.quantization.rounding import round_group
from gemma_pack.quantization.scheme import quantization_scheme
from gemma_pack.recipe import load_recipe

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def grown_bytes(rows, columns):
    seen = InputStatistics(columns, torch.device("cpu"))
    seen.total.uniform_().diagonal().add_(columns)
    weights, before = [torch.randn(rows // 2, columns)] * 2, peak_bytes()
    recipe = load_recipe("w4a16-fast")
    round_group(weights, quantization_scheme(recipe).weights, seen, recipe)
    return peak_bytes() - before

grown_bytes(256, 256)  # what first calls allocate
print(grown_bytes(16, 4096) / (4 * 4096**2))
print(grown_bytes(98304, 1024) / (4 * 98304 * 1024))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    hessians, weights = map(float, done.stdout.split())
    assert hessians < 1.4
    assert weights < 4


def test_a_hessian_that_is_none_is_refused() -> None:
    with pytest.raises(QuantizationError, match="positive definite"):
        factorize(-torch.eye(4), 0.01)


def test_what_a_column_costs_is_what_gptq_pays_for_its_error() -> None:
    """The loss of a rounded matrix is the sum over columns of the error when their turn came, times their cost."""
    hessian = statistics_of(correlated_inputs(2000, 64)).hessian(0)
    dampened = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    factor = factorize(hessian, 0.01)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    turns: list[torch.Tensor] = []

    def to_quarters(scaled: torch.Tensor) -> torch.Tensor:
        turns.append((scaled - scaled.round()) / 4)
        return scaled.round()

    off = gptq(weight, *one_scale(weight), factor, to_quarters, block=32) - weight
    costs = factor.column_costs()[factor.order.flip(0)]
    paid = (torch.stack(turns, 1).square() * costs).sum()
    assert float(paid) == pytest.approx(float(((off @ dampened) * off).sum()), rel=1e-3)
