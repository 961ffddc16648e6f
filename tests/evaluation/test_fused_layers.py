"""Norms and gated layers in one pass, against the modules of transformers whose place they take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from gemma_pack.evaluation.engines.fused_layers import ACTIVATION, GATED, NORMS, fuse, gate_rows
from gemma_pack.evaluation.engines.in_process import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tiny import Family

SIZE = 640


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def differences(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return by how many units in the last place of bfloat16 each number differs."""
    found, expected = (each.contiguous().view(torch.int16).int() for each in (found, expected))
    return (found - expected).abs()


def norm(kind: type[Any], **settings: bool) -> torch.nn.Module:
    made: torch.nn.Module = kind(SIZE, **settings)
    for weight in made.parameters():
        weight.data = states(SIZE, seed=1)
    return made.bfloat16()


@pytest.mark.parametrize(
    "layer",
    [norm(Gemma2RMSNorm), norm(Gemma3RMSNorm), norm(Gemma4RMSNorm), norm(Gemma4RMSNorm, with_scale=False)],
    ids=["gemma2", "gemma3", "gemma4", "gemma4 without weight"],
)
@torch.inference_mode()
def test_norms_are_those_of_transformers(layer: torch.nn.Module) -> None:
    fuse(layer, ACTIVATION)
    for inputs in (states(2, 30, SIZE), states(2, 5, 30, SIZE).transpose(1, 2), states(30, 2 * SIZE)[:, ::2]):
        expected = type(layer).forward(layer, inputs)
        found = layer(inputs)
        assert found.shape == expected.shape
        assert found.stride() == expected.stride()
        off = differences(found, expected)
        assert int(off.max()) <= 1
        assert float(off.float().mean()) < 0.001


@torch.inference_mode()
def test_the_gate_is_the_activation_of_transformers() -> None:
    gate, up = states(40, SIZE), states(40, SIZE, seed=1)
    found = torch.empty_like(gate)
    gate_rows(*(each.view(torch.int16).numpy() for each in (gate, up, found)))
    exact = torch.nn.functional.gelu(gate.double(), approximate="tanh").bfloat16() * up
    near = gate > -4  # below, torch loses what is left of 1 + tanh
    assert int(differences(found, exact)[near].max()) <= 1
    assert float((found != exact)[near].float().mean()) < 0.001
    assert float((found - exact)[~near].abs().max()) < 1e-3


@torch.inference_mode()
def test_the_gelu_of_large_numbers() -> None:
    gate = torch.tensor([[1e30, 100.0, 0.0, -0.0, -100.0, -1e30]]).bfloat16()
    found = torch.empty_like(gate)
    gate_rows(*(each.view(torch.int16).numpy() for each in (gate, torch.ones_like(gate), found)))
    assert found[0, :2].equal(gate[0, :2])
    assert found[0, 2:].abs().max() < 1e-6


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@torch.inference_mode()
def test_what_is_not_finite_stays_so(wrong: float) -> None:
    inputs = states(3, SIZE)
    inputs[1, 7] = wrong
    layer = norm(Gemma3RMSNorm)
    fuse(layer, ACTIVATION)
    found = torch.empty_like(inputs)
    gate_rows(*(each.view(torch.int16).numpy() for each in (inputs, torch.ones_like(inputs), found)))
    for made in (layer(inputs), found):
        assert torch.isfinite(made).all(-1).tolist() == [True, False, True]


def test_what_is_to_be_differentiated_goes_its_usual_way() -> None:
    layer = norm(Gemma3RMSNorm)
    fuse(layer, ACTIVATION)
    inputs = states(3, SIZE).requires_grad_()
    layer(inputs).sum().backward()
    assert inputs.grad is not None
    assert layer(states(3, SIZE).float()).dtype == torch.float32


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma4_text", "gemma4_unified"])
@torch.inference_mode()
def test_a_model_computes_what_transformers_computes(
    tiny_checkpoints: Callable[[Family], Path], family: Family
) -> None:
    from transformers import AutoModelForCausalLM

    directory = tiny_checkpoints(family)
    model = load(directory, "base", "cpu")
    layers = [layer for layer in model.module.modules() if type(layer).__name__ in {*NORMS, *GATED}]
    assert all("forward" in vars(layer) for layer in layers)
    assert len(layers) >= 3 * 5 + 1  # in each of three layers a gated one and four norms, in the end one more
    plain = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation=model.module.config._attn_implementation
    )
    ids = torch.randint(5, 500, (2, 60), generator=torch.Generator().manual_seed(0))
    expected = plain.model(input_ids=ids, use_cache=False).last_hidden_state.float()
    found = model.hidden(ids).float()
    exact = plain.float().model(input_ids=ids, use_cache=False).last_hidden_state
    distance = (expected - exact).norm() / exact.norm()  # what bfloat16 takes from it anyway
    assert float((found - exact).norm() / exact.norm()) < 1.1 * float(distance)
