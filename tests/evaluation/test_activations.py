"""The rounding of activations: grids value by value, schemes against vLLM's rules and compressed-tensors."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize

from gemma_pack.evaluation.engines import activations
from gemma_pack.evaluation.engines.activations import (
    E2M1,
    E4M3,
    INT8,
    ActivationScheme,
    Grid,
    round_activations,
    scheme_of,
)
from gemma_pack.evaluation.engines.in_process import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def rounded(grid: Grid, values: torch.Tensor) -> torch.Tensor:
    values = values.clone()
    grid.round_(values, torch.empty_like(values))
    return values


def nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Of equally near values the one with an even code."""
    distance = (values.abs()[..., None] - E2M1_VALUES).abs().double()
    distance += 1e-9 * (torch.arange(8) % 2)
    return E2M1_VALUES[distance.argmin(-1)].copysign(values)


def test_e4m3_rounds_as_the_processor_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    between = (codes[1:] + codes[:-1]) / 2
    spread = torch.randn(100_000) * torch.exp(4 * torch.randn(100_000))
    for values in (
        codes,
        between,
        between.nextafter(codes[1:]),
        between.nextafter(codes[:-1]),
        spread.clamp(-448, 448),
    ):
        assert torch.equal(rounded(E4M3, values), values.to(torch.float8_e4m3fn).float())


def test_e2m1_rounds_to_the_nearest_and_ties_to_even() -> None:
    values = torch.cat([torch.linspace(-6, 6, 4801), torch.tensor([1e-30, -1e-30])])
    assert torch.equal(rounded(E2M1, values), nearest_e2m1(values))


@pytest.mark.parametrize("grid", [INT8, E4M3, E2M1])
def test_what_is_not_a_number_stays_none(grid: Grid) -> None:
    assert rounded(grid, torch.tensor([torch.nan, 1.0])).isnan().tolist() == [True, False]


def float8(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float8_e4m3fn).float()


def by_token(states: torch.Tensor) -> torch.Tensor:
    scale = (states.abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    return float8(states / scale) * scale


def by_group(states: torch.Tensor) -> torch.Tensor:
    return by_token(states.unflatten(-1, (-1, 32))).flatten(-2)


def to_int8(states: torch.Tensor) -> torch.Tensor:
    scale = states.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale == 0, 0, (states / scale).round() * scale)


def by_one_scale(states: torch.Tensor) -> torch.Tensor:
    return float8((states / 0.0625).clamp(-448, 448)) * 0.0625


def to_nvfp4(states: torch.Tensor) -> torch.Tensor:
    groups = states.unflatten(-1, (-1, 16))
    scale = float8((groups.abs().amax(-1, keepdim=True) / 6 * 37.5).clamp(max=448)) / 37.5
    codes = nearest_e2m1((groups / scale).clamp(-6, 6))
    return torch.where(scale == 0, 0, codes * scale).flatten(-2)


@pytest.mark.parametrize("columns", [64, 640])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("scheme", "rule"),
    [
        (ActivationScheme(E4M3), by_token),
        (ActivationScheme(E4M3, group_size=32), by_group),
        (ActivationScheme(INT8), to_int8),
        (ActivationScheme(E4M3, scale=0.0625), by_one_scale),
        (ActivationScheme(E2M1, group_size=16, global_scale=37.5), to_nvfp4),
    ],
    ids=["fp8 by token", "fp8 by group", "int8 by token", "fp8 by one scale", "nvfp4"],
)
def test_a_scheme_follows_the_servers_rule(
    monkeypatch: pytest.MonkeyPatch,
    *,
    scheme: ActivationScheme,
    rule: Callable[[torch.Tensor], torch.Tensor],
    alone: bool,
    columns: int,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 if alone else 2)
    monkeypatch.setattr(activations, "VALUES_AT_ONCE", 7 * 640)  # the last few tokens of a thread alone are fewer
    generator = torch.Generator().manual_seed(0)
    states = (20 * torch.randn(3, 11, columns, generator=generator)).exp2().bfloat16()
    states *= torch.randn(states.shape, generator=generator).sign()
    states[0, 0], states[1, 2, 5] = 0, 3e4
    found = scheme.round(states)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rule(states.float()).bfloat16())
    assert torch.equal(scheme.round(states.transpose(0, 1)), found.transpose(0, 1))
    assert scheme.round(states[:0]).shape == (0, 11, columns)


def linear_with(arguments: QuantizationArgs) -> Any:
    layer: Any = torch.nn.Linear(64, 8, bias=False)
    layer.quantization_scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(), input_activations=arguments
    )
    return layer


@pytest.mark.parametrize(
    "arguments",
    [
        QuantizationArgs(num_bits=8, type="int", symmetric=False, strategy="token", dynamic=True),
        QuantizationArgs(num_bits=4, type="int", strategy="token", dynamic=True),
        QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=True),
        QuantizationArgs(num_bits=8, type="int", strategy="tensor", dynamic=False),
    ],
)
def test_what_no_recipe_asks_for_stays_with_compressed_tensors(arguments: QuantizationArgs) -> None:
    layer = linear_with(arguments)
    theirs = layer.forward = lambda states: states
    assert scheme_of(arguments, layer) is None
    assert round_activations(torch.nn.Sequential(layer)) == 0
    assert layer.forward is theirs


def test_states_that_several_layers_read_are_rounded_once_in_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    model = torch.nn.ModuleList([linear_with(arguments), linear_with(arguments)])
    for layer in model:
        layer.forward = layer.forward  # as compressed-tensors leaves it, on the layer
    calls: list[int] = []
    real = ActivationScheme.round

    def counted(self: ActivationScheme, states: torch.Tensor) -> torch.Tensor:
        calls.append(threading.get_ident())
        return real(self, states)

    monkeypatch.setattr(ActivationScheme, "round", counted)
    assert round_activations(model) == 2
    states, others = torch.randn(5, 64), torch.randn(5, 64)

    def read() -> None:
        for some in (states, others):
            for layer in model:
                expected = by_token(some) @ layer.weight.T
                assert torch.equal(layer(some), expected)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    read()
    assert len(calls) == 4
    assert len(set(calls)) == 2


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "FP8", "NVFP4", "W8A8"])
def test_the_schemes_of_recipes_are_rounded_as_compressed_tensors_does_of_float32(scheme: str) -> None:
    """In bf16 its scales and quotients are rounded, too; for W8A8 its scales are the highest / 127.5, vLLM's / 127."""
    arguments = preset_name_to_scheme(scheme, ["Linear"]).input_activations
    layer = linear_with(arguments)
    layer.input_scale, layer.input_global_scale = torch.tensor([0.0078125]), torch.tensor([500.0])
    if scheme != "NVFP4":
        del layer.input_global_scale
    layer.quantization_status = QuantizationStatus.FROZEN
    states = torch.randn(2, 40, 640, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounding = scheme_of(arguments, layer)
    assert rounding
    ours = rounding.round(states).float()
    theirs = forward_quantize(layer, states.float(), "input", arguments).bfloat16().float()
    if scheme == "W8A8":
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01
    else:
        assert float((ours != theirs).float().mean()) < 0.001  # ties, where a quotient is another


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
def test_all_layers_of_a_variant_are_rounded_here(tiny_variants: Callable[[str], Path], scheme: str) -> None:
    model = load(tiny_variants(scheme), "variant", "cpu").module
    layers = [layer for layer in model.modules() if getattr(layer, "quantization_scheme", None)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert all(layer._forward_pre_hooks for layer in layers)
    assert not any("forward" in vars(layer) for layer in layers)
