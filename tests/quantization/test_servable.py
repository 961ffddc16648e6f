"""A base that no server would load what is made of is refused before any work, and a copied head is left out."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import CheckpointError, QuantizationError
from gemma_pack.quantization import variant as variants
from gemma_pack.quantization.loader import is_ignored, prove_loadable
from gemma_pack.quantization.variant import quantize
from gemma_pack.recipe import parse_recipe
from tests.quantization.conftest import RECIPE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.variant import Job

    Tensors = dict[str, torch.Tensor]
    Altered = Callable[..., Path]
    MakeJob = Callable[..., Job]

FREE = "name: free\nsummary: x\nscheme: FP8_DYNAMIC\nalgorithm: nearest\ngate: [{kl_nats: 1}]\n"
both_paths = pytest.mark.parametrize("recipe", [RECIPE, FREE], ids=["calibrated", "streamed"])


@pytest.fixture
def altered(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> Altered:
    """Return a function that copies a tiny Gemma, changing its tensors and its config."""

    def make(family: str, change: Callable[[Tensors], Tensors] = dict, **config: Any) -> Path:
        base = shutil.copytree(tiny_checkpoints(family), tmp_path / "base")
        tensors = change(load_file(base / "model.safetensors"))
        save_file({name: t.contiguous() for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
        said = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(said | config))
        return base

    return make


def embedding(tensors: Tensors) -> torch.Tensor:
    return next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))


def with_copied_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": embedding(tensors).clone()}


def with_another_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": embedding(tensors) * 2}


@both_paths
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3"])
def test_a_copy_of_the_tied_embedding_is_not_in_the_variant(
    altered: Altered, make_job: MakeJob, tmp_path: Path, reporter: Reporter, family: str, recipe: str
) -> None:
    """vLLM's Gemma2ForCausalLM has no lm_head and ends with a KeyError where it meets one."""
    base = altered(family, with_copied_head)
    variant = quantize(make_job(base, recipe), tmp_path / "made", reporter)
    assert not [name for name in Checkpoint.open(variant.directory).tensors if "lm_head" in name]
    proof = variant.record.quantization.untouched
    assert "lm_head.weight" in proof.changed
    assert proof.untouched == len(Checkpoint.open(base).tensors) - len(proof.changed)


def test_a_head_said_not_to_be_tied_stays(
    altered: Altered, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    base = altered("gemma3_text", with_copied_head, tie_word_embeddings=False)
    variant = quantize(make_job(base, FREE), tmp_path / "made", reporter)
    assert "lm_head.weight" in Checkpoint.open(variant.directory).tensors


def with_stray_buffer(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32, dtype=torch.bfloat16)}


@both_paths
@pytest.mark.parametrize(
    ("family", "change", "config", "message"),
    [
        ("gemma2", with_another_head, {}, r"lm_head\.weight is a head of its own"),
        ("gemma2", with_copied_head, {"tie_word_embeddings": False}, r"lm_head\.weight is a head of its own"),
        ("gemma3_text", dict, {"vocab_size": 576}, r"embedding has 512 rows, and config\.json says vocab_size 576"),
        ("gemma3_text", with_stray_buffer, {}, r"layers\.0\.self_attn\.rotary_emb\.inv_freq has no place"),
        (
            "gemma3_text",
            dict,
            {"intermediate_size": 512},
            r"is BF16 \[256, 128\], and .* BF16 \[512, 128\]",
        ),
    ],
)
def test_a_base_that_cannot_be_served_is_refused_before_any_work(
    altered: Altered,
    make_job: MakeJob,
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    change: Callable[[Tensors], Tensors],
    config: dict[str, Any],
    message: str,
    recipe: str,
) -> None:
    job = make_job(altered(family, change, **config), recipe)
    monkeypatch.setattr(variants, "_open_journal", None)
    with pytest.raises(CheckpointError, match=message) as caught:
        quantize(job, tmp_path / "made", reporter)
    assert "\n" not in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_another_head_beside_a_vision_tower_is_ignored_by_its_own_name(
    altered: Altered, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    def change(tensors: Tensors) -> Tensors:
        assert "language_model.model.norm.weight" in tensors  # the old names, under which the head has such a one, too
        return tensors | {"language_model.lm_head.weight": embedding(tensors) * 2}

    variant = quantize(make_job(altered("gemma3", change), FREE), tmp_path / "made", reporter)
    assert "language_model.lm_head.weight" in Checkpoint.open(variant.directory).tensors
    ignore = json.loads((variant.directory / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore[:2] == ["language_model.lm_head", "lm_head"]


@pytest.mark.parametrize("family", ["gemma4_text", "gemma4"])
def test_ignored_keys_of_a_gemma_4_name_the_values_that_servers_fuse_with_them(
    tiny_checkpoints: Callable[[str], Path], make_job: MakeJob, tmp_path: Path, reporter: Reporter, family: str
) -> None:
    """vLLM asks for q, k and v of each layer, also of a full one that has no v, and they must agree."""
    recipe = FREE + 'ignore: ["re:.*layers.2.self_attn.*"]\n'
    variant = quantize(make_job(tiny_checkpoints(family), recipe), tmp_path / "made", reporter)
    path = variant.directory / "config.json"
    config = json.loads(path.read_text())
    prefixes = ("model.",) if family == "gemma4_text" else ("model.language_model.", "language_model.model.")
    for prefix in prefixes:
        assert all(is_ignored(f"{prefix}layers.2.self_attn.{part}_proj", config) for part in "qkv")
        assert not any(is_ignored(f"{prefix}layers.1.self_attn.{part}_proj", config) for part in "qkv")
    values = [name for name in config["quantization_config"]["ignore"] if name.endswith("v_proj")]
    config["quantization_config"]["ignore"].remove(values[-1])
    path.write_text(json.dumps(config))
    with pytest.raises(QuantizationError, match=rf"does not name {values[-1]}"):
        prove_loadable(Checkpoint.open(variant.directory), parse_recipe(recipe, origin="r"))
