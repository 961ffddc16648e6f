"""CUDA against the CPU: the same recipe on the same text gives nearly the same variant. Run with `-m gpu`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from gemma_pack.build import CalibrationChoice, quantize_model
from gemma_pack.console import Console
from gemma_pack.quantization import refinement
from gemma_pack.quantization.packing import unpack
from gemma_pack.quantization.scheme import quantization_scheme
from gemma_pack.recipe import load_recipe, shipped_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tiny import Family

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
CHOICE = CalibrationChoice("builtin", samples=8, sequence_length=64)


def weights(directory: Path, recipe: str) -> torch.Tensor:
    """Return all rounded weights, as a server computes with them."""
    scheme = quantization_scheme(load_recipe(recipe))
    found = {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}
    names = sorted({name.rpartition(".")[0] for name in found if name.endswith(".weight_scale")})
    return torch.cat([unpack(name, found, scheme).float().flatten() for name in names])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma4_text"])
@pytest.mark.parametrize("recipe", ["fp8-dynamic", "w4a16-fast", "w8a8", "nvfp4"])
def test_cuda_makes_nearly_what_the_cpu_makes(
    tiny_checkpoints: Callable[[Family], Path], tmp_path: Path, family: Family, recipe: str
) -> None:
    """Without data the bytes agree; with it sums go in another order, and one weight in fifty may take another code."""
    made = [
        quantize_model(
            str(tiny_checkpoints(family)), recipe, tmp_path / device, CHOICE, device=device, reporter=Console("quiet")
        ).directory
        for device in ("cpu", "cuda")
    ]
    one, other = (weights(directory, recipe) for directory in made)
    if recipe == "fp8-dynamic":
        assert torch.equal(one, other)
    apart = (one - other).abs() > 0.1 * one.abs().mean()
    assert float(apart.float().mean()) < 0.02


@pytest.mark.parametrize("recipe", ["w4a16-fast", "w4a16"])
def test_the_same_device_gives_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path, recipe: str) -> None:
    """`w4a16` refines at 256 tokens, where a fast attention kernel splits its sums on the way back."""
    made = [
        quantize_model(
            str(tiny_checkpoint), recipe, tmp_path / name, CHOICE, device="cuda", reporter=Console("quiet")
        ).directory
        for name in ("a", "b")
    ]
    for path in made[0].glob("*.safetensors"):
        assert path.read_bytes() == (made[1] / path.name).read_bytes()


def test_refinement_with_its_layers_in_host_memory_gives_the_same_bytes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "short.yaml"
    recipe.write_text(shipped_text("w4a16").replace("sequence_length: 256", "sequence_length: 64"), "utf-8")
    made = []
    for name, streamed in (("resident", False), ("streamed", True)):
        monkeypatch.setattr(refinement, "must_stream", lambda *_, streamed=streamed: streamed)
        target = tmp_path / name
        made.append(
            quantize_model(
                str(tiny_checkpoint), str(recipe), target, CHOICE, device="cuda", reporter=Console("quiet")
            ).directory
        )
    for path in made[0].glob("*.safetensors"):
        assert path.read_bytes() == (made[1] / path.name).read_bytes()
