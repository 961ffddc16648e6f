"""A tiny Gemma that has learned a little, and variants of it that were harmed in known ways."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from gemma_pack.console import Console
from gemma_pack.recipe import parse_recipe
from gemma_pack.record import QuantizationRecord, Record, SourceRecord, UntouchedProof
from gemma_pack.texts import Windows, load_windows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

RECIPE = """\
name: tiny-w8a16
summary: for tests
scheme: W8A16
algorithm: nearest
gate: [{ppl_increase_percent: 3, kl_nats: 0.05, same_top1_percent: 90}]
"""


@pytest.fixture
def reporter() -> Console:
    return Console("quiet")


@pytest.fixture
def make_variant(trained: Path, tmp_path: Path, reporter: Console) -> Callable[..., Path]:
    """Return a function that makes a variant of `trained` whose weights `harm` may change, name by name.

    It has the record and recipe of a quantization that did not happen, and bf16 weights: what is tested here is how
    the difference is measured, not how it came about.
    """
    from safetensors.torch import load_file, save_file

    from gemma_pack.sources.directory import check_directory

    def make(harm: Callable[[str, torch.Tensor], torch.Tensor] | None = None, *, name: str = "variant") -> Path:
        directory = tmp_path / name
        shutil.copytree(trained, directory)
        if harm:
            weights = {
                n: harm(n, w).to(w.dtype).contiguous() for n, w in load_file(directory / "model.safetensors").items()
            }
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "recipe.yaml").write_text(RECIPE)
        record_of(check_directory(trained, reporter)).write(directory)
        return directory

    return make


def record_of(source: SourceRecord) -> Record:
    return Record(
        source=source,
        quantization=QuantizationRecord(
            recipe="tiny-w8a16",
            recipe_sha256=parse_recipe(RECIPE, origin="recipe.yaml").digest(),
            scheme="int8 weights",
            algorithm="nearest",
            device="cpu",
            versions={"torch": "2"},
            untouched=UntouchedProof(changed=(), untouched=1, sha256="0" * 64),
            base_size_bytes=2,
            size_bytes=1,
        ),
    )


def noise(share: float, *, where: str = "_proj", seed: int = 0) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return a harm that adds Gaussian noise, `share` of its own spread, to each weight whose name holds `where`."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def harm(name: str, weight: torch.Tensor) -> torch.Tensor:
        if where not in name:
            return weight
        return weight + share * weight.float().std() * torch.randn(weight.shape, generator=generator)

    return harm


@pytest.fixture(scope="session")
def evaluation_windows(trained: Path) -> Windows:
    return load_windows("builtin", "evaluation", trained, samples=40, sequence_length=64, seed=3)
