from __future__ import annotations

import pytest
import torch

from gemma_pack.errors import QuantizationError
from gemma_pack.quantization.input_statistics import InputStatistics
from gemma_pack.quantization.rounding import round_group
from gemma_pack.quantization.scheme import quantization_scheme
from gemma_pack.recipe import Gptq, parse_recipe
from tests.quantization.conftest import RECIPE


def correlated_inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs as a model has them: a few directions carry most of the variance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    return (torch.randn(tokens, columns, generator=generator) @ mixing).to(torch.bfloat16)


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[-1], torch.device("cpu"))
    statistics.add(inputs[None])
    return statistics


def windows_of(count: int, tokens: int, columns: int) -> torch.Tensor:
    """Windows that all begin with the same token, as <bos> is."""
    windows = correlated_inputs(count * tokens, columns).view(count, tokens, columns)
    windows[:, 0] = windows[0, 0].clone()
    return windows


def test_the_hessian_is_twice_the_mean_outer_product() -> None:
    inputs = correlated_inputs(300, 64)
    statistics = InputStatistics(64, torch.device("cpu"))
    for part in inputs.reshape(3, 100, 64).split(2):
        statistics.add(part)
    exact = 2 * inputs.double().T @ inputs.double() / 300
    assert torch.allclose(statistics.hessian(0).double(), exact, rtol=1e-5, atol=1e-5 * float(exact.max()))
    assert torch.equal(statistics.largest, inputs.float().abs().amax(0))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_the_first_tokens_of_all_windows_have_their_share(share: float) -> None:
    windows = windows_of(3, 50, 16)
    statistics = InputStatistics(16, torch.device("cpu"))
    for part in windows.split(2):
        statistics.add(part)
    weights = torch.ones(3, 50, dtype=torch.float64)
    weights[:, 0] = share / (1 - share) * 49
    assert float(weights[:, 0].sum() / weights.sum()) == pytest.approx(share)
    rows = windows.double().flatten(0, 1)
    exact = 2 * (rows * weights.flatten()[:, None]).T @ rows / weights.sum()
    assert torch.allclose(statistics.hessian(share).double(), exact, rtol=1e-4, atol=1e-5 * float(exact.max()))


def test_a_smoothed_input_has_the_statistics_of_what_was_divided() -> None:
    windows = windows_of(2, 30, 8)
    factors = torch.tensor([0.5, 1, 2, 4, 0.25, 1, 8, 2])  # powers of two: nothing is rounded
    whole, divided = (InputStatistics(8, torch.device("cpu")) for _ in range(2))
    whole.add(windows)
    divided.add(windows / factors.to(torch.bfloat16))
    assert torch.allclose(whole.divided(factors).hessian(0.25), divided.hessian(0.25), rtol=1e-4)
    assert torch.equal(whole.divided(factors).largest, divided.largest)


def test_the_first_token_is_computed_the_more_exactly_the_larger_its_share() -> None:
    windows = windows_of(8, 60, 256)
    recipe = parse_recipe(RECIPE, origin="tiny.yaml")
    statistics = InputStatistics(256, torch.device("cpu"))
    statistics.add(windows)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    errors = []
    for share in (0.0, 0.25, 0.5):
        settings = recipe.model_copy(update={"gptq": Gptq(sink_share=share)})
        rounded = round_group([weight], quantization_scheme(settings).weights, statistics, settings)[0]
        errors.append(float(((rounded.weight - weight.float()) @ windows[0, 0].float()).square().mean()))
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < errors[1]


def test_inputs_that_are_not_finite_are_refused() -> None:
    inputs = correlated_inputs(20, 8)
    inputs[3, 2] = torch.inf
    with pytest.raises(QuantizationError, match="not finite"):
        statistics_of(inputs).hessian(0.25)
