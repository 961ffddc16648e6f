"""What a plan says a variant will weigh, beside the variant that quantize makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gemma_pack.build import CalibrationChoice, quantize_model
from gemma_pack.checkpoint import Checkpoint
from gemma_pack.console import Console
from gemma_pack.errors import RecipeError
from gemma_pack.oci.layers import plan_layers
from gemma_pack.planning import make_plan
from gemma_pack.planning.sizes import plan_sizes
from gemma_pack.recipe import load_recipe
from gemma_pack.sources.outline import outline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tiny import Family

RECIPE = """\
name: {name}
summary: for tests
scheme: {scheme}
{extra}
algorithm: nearest
gate: [{{kl_nats: 100}}]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    def write(scheme: str, extra: str = "") -> str:
        path = tmp_path / f"{scheme.lower()}.yaml"
        path.write_text(RECIPE.format(name=scheme.lower().replace("_", "-"), scheme=scheme, extra=extra), "utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("family", "scheme", "extra"),
    [
        ("gemma3_text", "W8A16", ""),
        ("gemma3_text", "W4A16", "group_size: 64"),
        ("gemma3", "FP8_DYNAMIC", ""),
        ("gemma2", "W8A16", "ignore: ['re:.*layers.1.*']"),
    ],
)
def test_the_planned_bytes_are_those_of_the_variant(
    tiny_checkpoints: Callable[[Family], Path],
    recipe: Callable[..., str],
    tmp_path: Path,
    family: Family,
    scheme: str,
    extra: str,
) -> None:
    base, path = tiny_checkpoints(family), recipe(scheme, extra)
    found = outline(str(base))
    sizes = plan_sizes(found.checkpoint, load_recipe(path), found.companions)
    variant = quantize_model(
        str(base), path, tmp_path / "variant", CalibrationChoice(), device="cpu", reporter=Console("quiet")
    )
    checkpoint = Checkpoint.open(variant.directory)
    assert variant.record.quantization
    assert sizes.variant_bytes == variant.record.quantization.size_bytes == checkpoint.size_bytes
    assert sizes.base_bytes == variant.record.quantization.base_size_bytes
    assert sizes.changed == set(variant.record.quantization.untouched.changed)
    assert {path.name: path.stat().st_size for path in checkpoint.shards} == {
        name: size for name, size in sizes.files.items() if name.endswith(".safetensors")
    }
    plan = make_plan(found, load_recipe(path), None, directory=tmp_path)
    real = {layer.title: layer.size_bytes for layer in plan_layers(checkpoint)}
    planned = {layer.title: layer.size_bytes for layer in plan.layers}
    assert planned.keys() == real.keys()
    assert all(abs(planned[title] - real[title]) < 64_000 for title in real)
    assert all(planned[title] == real[title] for title in real if title.startswith(("model-", "tokenizer")))


def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_fetched(
    tiny_checkpoint: Path, recipe: Callable[..., str]
) -> None:
    found = outline(str(tiny_checkpoint))
    with pytest.raises(RecipeError, match="ignore: nothing"):
        plan_sizes(found.checkpoint, load_recipe(recipe("W8A16", "ignore: [nothing]")), {})
