from __future__ import annotations

import pytest
import torch

from gemma_pack.quantization.input_statistics import InputStatistics
from gemma_pack.quantization.transforms import smooth, smoothed_weights

MLP = "model.layers.0.mlp"
ATTENTION = "model.layers.0.self_attn"
GROUPS = [
    [f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj", f"{ATTENTION}.v_proj"],
    [f"{ATTENTION}.o_proj"],
    [f"{MLP}.gate_proj", f"{MLP}.up_proj"],
    [f"{MLP}.down_proj"],
]
NORM = "model.layers.0.pre_feedforward_layernorm.weight"
WIDTH, INNER = 48, 96


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """An MLP with the norm before it; channel 5 has no gain, channel 7 a gain of one."""
    generator = torch.Generator().manual_seed(0)
    made = {
        f"{MLP}.gate_proj.weight": torch.randn(INNER, WIDTH, generator=generator),
        f"{MLP}.up_proj.weight": torch.randn(INNER, WIDTH, generator=generator),
        f"{MLP}.down_proj.weight": torch.randn(WIDTH, INNER, generator=generator),
        NORM: torch.randn(WIDTH, generator=generator),
    }
    made[NORM][5], made[NORM][7] = -1, 0
    return {name: tensor.to(torch.bfloat16) for name, tensor in made.items()}


def normed(norm: torch.Tensor) -> torch.Tensor:
    """Inputs of the MLP, float64, with outliers in channel 3."""
    inputs = torch.randn(200, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs[:, 3] *= 50
    return inputs * (1 + norm.double())


def inner(inputs: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(inputs @ gate.double().T, approximate="tanh") * (inputs @ up.double().T)


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[-1], torch.device("cpu"))
    statistics.add(inputs.to(torch.bfloat16)[None])
    return statistics


@pytest.mark.parametrize("strength", [0.25, 0.75])
def test_a_smoothed_mlp_computes_what_it_did(tensors: dict[str, torch.Tensor], strength: float) -> None:
    gate_up, down = GROUPS[2], GROUPS[3]
    before = normed(tensors[NORM])
    gate, up = (tensors[f"{name}.weight"] for name in gate_up)
    output = inner(before, gate, up) @ tensors[f"{MLP}.down_proj.weight"].double().T
    by_norm = smooth(gate_up, tensors, statistics_of(before), strength, offset=1)
    by_up = smooth(down, tensors, statistics_of(inner(before, gate, up)), strength, offset=1)
    assert by_norm is not None
    assert by_up is not None
    assert by_norm.norm_weight is not None
    plan = [None, None, by_norm, by_up]
    new_gate, new_up = smoothed_weights(gate_up, tensors, GROUPS, plan)
    (new_down,) = smoothed_weights(down, tensors, GROUPS, plan)
    after = normed(by_norm.norm_weight)
    again = inner(after, new_gate, new_up) @ new_down.double().T
    assert torch.allclose(again, output, rtol=0, atol=3e-6 * float(output.abs().max()))
    largest = [statistics_of(inputs).largest for inputs in (before, after)]
    assert largest[1].max() / largest[1].median() < 0.7 * largest[0].max() / largest[0].median()


def test_a_channel_that_its_norm_silences_stays_as_it_is(tensors: dict[str, torch.Tensor]) -> None:
    change = smooth(GROUPS[2], tensors, statistics_of(normed(tensors[NORM])), 0.5, offset=1)
    assert change is not None
    assert change.norm_weight is not None
    assert change.columns[5] == 1
    assert change.norm_weight[5] == -1


def test_up_is_divided_by_powers_of_two_so_that_its_codes_stay(tensors: dict[str, torch.Tensor]) -> None:
    hidden = torch.randn(100, INNER, generator=torch.Generator().manual_seed(2)).exp()
    change = smooth(GROUPS[3], tensors, statistics_of(hidden), 0.5, offset=1)
    assert change is not None
    assert change.norm is None
    assert torch.equal(change.columns.log2(), change.columns.log2().round())
    assert len(change.columns.unique()) > 1
    _, up = smoothed_weights(GROUPS[2], tensors, GROUPS, [None, None, None, change])
    assert torch.equal(up * change.columns[:, None], tensors[f"{MLP}.up_proj.weight"].float())


def test_what_nothing_scales_is_not_smoothed(tensors: dict[str, torch.Tensor]) -> None:
    assert smooth(GROUPS[1], tensors, statistics_of(torch.ones(4, WIDTH)), 0.5, offset=1) is None
