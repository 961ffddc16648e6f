"""The loader proof: what no server would load is refused, by name, before anything is kept."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import QuantizationError
from gemma_pack.quantization.loader import is_ignored, prove_loadable
from gemma_pack.quantization.variant import quantize
from gemma_pack.recipe import parse_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.variant import Job

    Tensors = dict[str, torch.Tensor]

RECIPE = "name: free\nsummary: x\nscheme: FP8_DYNAMIC\nalgorithm: nearest\ngate: [{kl_nats: 1}]\n"
LINEAR = "model.layers.1.self_attn.k_proj"


@pytest.fixture
def variant(
    tiny_checkpoint: Path, make_job: Callable[..., Job], tmp_path: Path, reporter: Reporter
) -> Callable[..., Checkpoint]:
    """Return a function that quantizes a tiny Gemma 3, then changes tensors or the ignore list."""

    def make(change: Callable[[Tensors], object] | None = None, ignore: list[str] | None = None) -> Checkpoint:
        made = quantize(make_job(tiny_checkpoint, RECIPE), tmp_path / "made", reporter).directory
        single = tmp_path / "single"
        single.mkdir()
        tensors = {name: tensor for path in made.glob("*.safetensors") for name, tensor in load_file(path).items()}
        if change:
            change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, single / "model.safetensors")
        config = json.loads((made / "config.json").read_text())
        if ignore is not None:
            config["quantization_config"]["ignore"] = ignore
        (single / "config.json").write_text(json.dumps(config))
        return Checkpoint.open(single)

    return make


def test_the_record_says_what_was_compared(
    tiny_checkpoint: Path, make_job: Callable[..., Job], tmp_path: Path, reporter: Reporter
) -> None:
    ignoring = RECIPE + 'ignore: ["re:.*layers.0.mlp.*"]\n'
    proof = quantize(make_job(tiny_checkpoint, ignoring), tmp_path / "made", reporter).record.quantization.loader
    assert (proof.quantized, proof.in_bf16) == (18, 3)
    assert (
        proof.decoder_tensors == 2 * 18 + 3 + 3 * 6 + 2
    )  # weight and scale, bf16 linears, norms, last norm, embedding


def test_a_sound_variant_passes(variant: Callable[..., Checkpoint]) -> None:
    recipe = parse_recipe(RECIPE, origin="r")
    assert prove_loadable(variant(), recipe).quantized == 21


def unfused(tensors: Tensors) -> None:
    tensors[f"{LINEAR}.weight"] = tensors[f"{LINEAR}.weight"].to(torch.bfloat16)
    del tensors[f"{LINEAR}.weight_scale"]


def renamed(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.down_proj.scale"] = tensors.pop("model.layers.0.mlp.down_proj.weight_scale")


def renamed_decoder(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors["decoder." + name] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unfused, r"servers fuse .*k_proj, .*v_proj, and they are quantized two ways"),
        (renamed, r"layers\.0\.mlp\.down_proj\.weight_scale is missing"),
        (renamed_decoder, r"names begin with 'decoder\.model\.', which no server knows"),
        (lambda t: t.update({f"{LINEAR}.extra": torch.zeros(1)}), r"k_proj\.extra has no place in servers' class"),
        (
            lambda t: t.update({f"{LINEAR}.weight_scale": torch.zeros((64, 1))}),
            r"k_proj\.weight_scale is F32 \[64, 1\], and servers expect BF16 \[64, 1\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(128)}),
            r"model\.norm\.weight is F32 \[128\], and servers expect BF16 \[128\]",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].to(torch.float8_e4m3fn)}),
            r"embed_tokens\.weight is F8_E4M3",
        ),
        (lambda t: t.pop("model.layers.2.self_attn.q_norm.weight"), r"q_norm\.weight is missing"),
        (
            lambda t: t.update({"vision_tower.fc.weight": torch.zeros((4, 4), dtype=torch.bfloat16)}),
            r"vision_tower\.fc is in bf16, and the ignore list of config\.json does not name vision_tower\.fc",
        ),
    ],
)
def test_tensors_that_servers_do_not_expect_are_refused(
    variant: Callable[..., Checkpoint], change: Callable[[Tensors], object], message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        prove_loadable(variant(change), parse_recipe(RECIPE, origin="r"))


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ([], "does not name lm_head"),
        (["lm_head", LINEAR], r"k_proj is quantized, and the ignore list of config\.json names model"),
        (["lm_head", "re:.*mlp.*"], r"gate_proj is quantized, and the ignore list of config\.json names model"),
    ],
)
def test_an_ignore_list_at_odds_with_the_tensors_is_refused(
    variant: Callable[..., Checkpoint], ignore: list[str], message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        prove_loadable(variant(ignore=ignore), parse_recipe(RECIPE, origin="r"))


def test_another_schemes_shapes_are_refused(variant: Callable[..., Checkpoint]) -> None:
    with pytest.raises(QuantizationError, match=r"q_proj\.weight_packed is missing"):
        prove_loadable(variant(), parse_recipe(RECIPE.replace("FP8_DYNAMIC", "W8A16"), origin="r"))


def test_ignored_layers_beside_a_vision_tower_go_by_both_names(
    tiny_checkpoints: Callable[[str], Path], make_job: Callable[..., Job], tmp_path: Path, reporter: Reporter
) -> None:
    """vLLM reads the old names, transformers the new ones, whichever the checkpoint has."""
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoints("gemma3"), base)
    recipe = RECIPE + 'ignore: ["re:.*layers.0.mlp.down_proj"]\n'
    variant = quantize(make_job(base, recipe), tmp_path / "made", reporter)
    config = json.loads((variant.directory / "config.json").read_text())
    for name in ("language_model.model.layers.0.mlp.down_proj", "model.language_model.layers.0.mlp.down_proj"):
        assert is_ignored(name, config)
        assert not is_ignored(name.replace("layers.0", "layers.1"), config)
    for name in ("vision_tower.encoder.fc", "model.vision_tower.encoder.fc", "model.multi_modal_projector.linear"):
        assert is_ignored(name, config)
