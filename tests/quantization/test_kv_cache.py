"""Scales of an FP8 cache: of what the cache will hold, under the names and with the config that vLLM loads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import RecipeError
from gemma_pack.quantization.variant import quantize
from gemma_pack.recipe import parse_recipe
from tests.quantization.conftest import RECIPE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.variant import Job
    from tests.tiny import Family

CACHED = RECIPE.replace("algorithm: gptq", "algorithm: nearest\nkv_cache: fp8")


@pytest.mark.parametrize("family", ["gemma3", "gemma4_text"])
def test_scales_cover_every_key_and_value_that_the_model_caches(
    tiny_checkpoints: Callable[[Family], Path],
    make_job: Callable[..., Job],
    tmp_path: Path,
    reporter: Reporter,
    family: Family,
) -> None:
    from transformers import AutoModelForCausalLM, DynamicCache

    job = make_job(tiny_checkpoints(family), CACHED)
    made = Checkpoint.open(quantize(job, tmp_path / "variant", reporter).directory)
    model = AutoModelForCausalLM.from_pretrained(job.base.directory, dtype=torch.bfloat16).eval()
    cache = DynamicCache()  # without a config it keeps every token of sliding layers too
    with torch.no_grad():
        model(input_ids=torch.from_numpy(job.windows.ids).long(), past_key_values=cache, use_cache=True)
    for index, layer in enumerate(cache.layers):
        for kind, states in (("k", layer.keys), ("v", layer.values)):
            [name] = [name for name in made.tensors if name.endswith(f"layers.{index}.self_attn.{kind}_scale")]
            info = made.tensors[name]
            assert (info.dtype, info.shape) == ("BF16", (1,))
            scale = torch.frombuffer(bytearray(info.read()), dtype=torch.bfloat16)
            assert float(scale) == pytest.approx(float(states.abs().max()) / 448, rel=2**-7)


def test_the_config_says_so_and_transformers_loads_it(
    tiny_checkpoint: Path, make_job: Callable[..., Job], tmp_path: Path, reporter: Reporter
) -> None:
    from transformers import AutoModelForCausalLM

    variant = quantize(make_job(tiny_checkpoint, CACHED), tmp_path / "variant", reporter)
    assert variant.record.quantization.scheme == "int4 weights in groups of 64, FP8 KV cache"
    config = json.loads((variant.directory / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    # what vLLM's CompressedTensorsKVCacheMethod.validate_kv_cache_scheme asks for
    assert {key: config[key] for key in ("type", "num_bits", "strategy", "symmetric")} == {
        "type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(variant.directory, dtype=torch.bfloat16).eval()
    assert model.model.layers[1].self_attn.k_scale.item() > 0


def test_a_cache_without_text_is_refused() -> None:
    text = "\n".join(line for line in CACHED.splitlines() if "calibration" not in line)
    with pytest.raises(RecipeError, match="calibration is missing"):
        parse_recipe(text, origin="r.yaml")
