"""Every shipped recipe quantizes the real model; vLLM's CPU build loads and answers from each it has a kernel for.

The model is two of the demo's layers, a sliding and a full one, under its real embedding: the same tensors, formats
and kernels in a ninth of the time. `make bench` quantizes all of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.recipe import load_recipe, shipped_names, shipped_text
from gemma_pack.record import require_record
from gemma_pack.safetensors_file import write_safetensors
from gemma_pack.texts import load_windows
from tests.real.processor import HAS_AMX, HAS_INT4, INT8_SATURATES
from tests.real.vllm_server import START_SECONDS, server_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.real

LAYERS: Final = (4, 5)
PROMPT_TOKENS: Final = 120
"""Of text: two layers that were cut out are unsure of most, and a few tokens would show bfloat16's noise alone."""
KERNEL_NATS: Final = 0.05
"""Between bfloat16 activations, with an int4 kernel or none, and float32; measured: 0.019 to 0.022."""
REFUSALS: Final = {
    "bnb-int8": "bitsandbytes",
    "bnb-nf4": "bitsandbytes",
    "fp8": "static_scaled_fp8_quant",
    "nvfp4": "Failed to find a kernel that can implement the NVFP4 linear layer",
    "w8a16": "Quant type (uint8b128) not supported by CPUWNA16",
}
"""What vLLM's CPU build, 0.32, says of schemes that it has no kernel for; GPU builds do, but for bitsandbytes."""
if not HAS_AMX:  # its kernel for this scheme multiplies by AMX alone
    REFUSALS["fp8-block"] = "CPUFp8BlockScaledMMKernel requires AMX tile support"
if not HAS_INT4:
    REFUSALS |= dict.fromkeys(("w4a16", "w4a16-fast", "w4a16-g32"), "cpu_gemm_wna16")
SATURATED: Final = {"w8a8"} if INT8_SATURATES else set[str]()
"""What vLLM's CPU build computes wrongly: `w8a8` is then 0.17 nats from float32 where 0.15 are allowed."""

BASE: Final = "base"
"""In bfloat16, which every processor multiplies: vLLM's arithmetic without a scheme."""
NOT_ASKED: Final = {"fp8-dynamic", "fp8-cache"}
"""vLLM's CPU build answers from FP8_DYNAMIC too, and takes ten minutes for a dozen tokens of the demo model."""


@pytest.fixture(scope="module")
def two_layers(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a checkpoint of two of the demo's layers; it and the variants beside it go when this file is through."""
    directory = tmp_path_factory.mktemp("cut") / "gemma"
    directory.mkdir()
    base = Checkpoint.open(demo_checkpoint)
    kept = [
        (name.replace(f"layers.{layer}.", f"layers.{number}.") if layer is not None else name, info)
        for name, info in base.tensors.items()
        for number, layer in [*enumerate(LAYERS), (0, None)]
        if (f"layers.{layer}." in name if layer is not None else ".layers." not in name)
    ]
    write_safetensors(directory / "model.safetensors", [(name, i.dtype, i.shape, i.read) for name, i in kept])
    kinds = [base.config["layer_types"][layer] for layer in LAYERS]
    config = base.config | {"num_hidden_layers": len(LAYERS), "layer_types": kinds}
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((demo_checkpoint / name).read_bytes())
    yield directory
    shutil.rmtree(directory.parent)


@pytest.fixture(scope="module")
def variants(two_layers: Path) -> dict[str, Path]:
    """Return the directory of a variant by each shipped recipe, and of w4a16-fast with an FP8 cache."""
    from gemma_pack.build import CalibrationChoice, quantize_models
    from gemma_pack.console import Console

    work = two_layers.parent
    short = {"refinement": {"steps": 4, "held_out": 2}}
    recipes: dict[Path, str] = {}
    texts = {name: shipped_text(name) for name in shipped_names()}
    texts["fp8-cache"] = shipped_text("w4a16-fast").replace("algorithm:", "kv_cache: fp8\nalgorithm:")
    for name, text in texts.items():
        settings: dict[str, Any] = yaml.safe_load(text) | {"name": name}
        for part in settings.keys() & short.keys():
            settings[part] |= short[part]
        (work / f"{name}.yaml").write_text(yaml.safe_dump(settings), "utf-8")
        recipes[work / name] = str(work / f"{name}.yaml")
    made = quantize_models(
        str(two_layers),
        recipes,
        CalibrationChoice("builtin", samples=4, sequence_length=128),
        device="cpu",
        offline=True,
        reporter=Console("quiet"),
    )
    return {variant.directory.name: variant.directory for variant in made}


@pytest.fixture(scope="module")
def prompt(two_layers: Path) -> list[int]:
    """Return ids that begin with <bos>."""
    windows = load_windows("builtin", "evaluation", two_layers, samples=1, sequence_length=PROMPT_TOKENS, seed=0)
    ids: list[int] = windows.ids[0].tolist()
    return ids


@pytest.fixture(scope="module")
def told(
    variants: dict[str, Path], two_layers: Path, prompt: list[int], vllm_python: Path
) -> dict[str, dict[str, Any]]:
    """Return what vLLM said of the base and of each variant."""
    file = two_layers.parent / "prompt.json"
    file.write_text(json.dumps(prompt), "utf-8")
    asked = {BASE: two_layers} | {name: path for name, path in variants.items() if name not in NOT_ASKED}
    script = str(__file__).replace("test_recipes.py", "vllm_offline.py")
    done = subprocess.run(
        [vllm_python, script, file, *asked.values()],
        env=server_environment(vllm_python),
        check=False,
        capture_output=True,
        text=True,
        timeout=2 * START_SECONDS,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(asked), done.stderr[-4000:]
    return {name: next(line for line in lines if line["directory"] == str(path)) for name, path in asked.items()}


def test_every_record_has_its_proofs(variants: dict[str, Path]) -> None:
    for name, directory in variants.items():
        made = require_record(directory).quantization
        assert made is not None
        recipe = load_recipe(str(directory / "recipe.yaml"))
        assert made.untouched.changed, name
        assert made.loader is not None, name
        assert made.loader.quantized == 2 * 7, name
        assert (made.smoothing is not None) == (recipe.smoothing is not None), name
        assert (made.refinement is not None) == (recipe.refinement is not None), name


@pytest.mark.parametrize("name", [BASE, *sorted({*shipped_names()} - NOT_ASKED - {*REFUSALS} - SATURATED)])
def test_vllm_computes_what_transformers_computes(
    name: str, told: dict[str, dict[str, Any]], variants: dict[str, Path], two_layers: Path, prompt: list[int]
) -> None:
    """In float32, which has no noise of its own. Half of w4a16's scales are below zero; a kernel that took their size
    alone would be noise.

    Where activations are quantized, each library rounds them at its own places.
    """
    assert told[name].get("text"), told[name]
    base = _logprobs(two_layers, prompt)
    ours = base if name == BASE else _logprobs(variants[name], prompt)
    apart, moved = (_distance(ours, other) for other in (told[name]["logprobs"], base))
    if name == BASE:
        assert apart < KERNEL_NATS
    elif load_recipe(name).scheme == "W4A16":
        assert apart < KERNEL_NATS < 0.5 * moved
    assert apart < max(0.15, moved), "the server is nearer to what was measured here than the base is"


@pytest.mark.parametrize("name", sorted(shipped_names()))
def test_transformers_loads_every_variant_and_answers(
    name: str, variants: dict[str, Path], two_layers: Path, prompt: list[int]
) -> None:
    from transformers import pipeline

    generate = pipeline("text-generation", model=str(variants[name]), dtype="auto")
    [answer] = generate("The opposite of hot is", max_new_tokens=4, do_sample=False, return_full_text=False)
    assert answer["generated_text"].strip()
    moved = _distance(*(_logprobs(directory, prompt, "bfloat16") for directory in (variants[name], two_layers)))
    assert 0.01 < moved < 5, "nats a token: two layers that were cut out are sure of much that is wrong"


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_vllm_says_that_its_cpu_build_has_no_kernel(name: str, told: dict[str, dict[str, Any]]) -> None:
    assert REFUSALS[name] in told[name].get("error", ""), told[name]


def test_vllms_int8_kernel_is_exact_where_the_processor_has_vnni_and_there_alone(vllm_python: Path) -> None:
    script = str(__file__).replace("test_recipes.py", "vllm_int8.py")
    done = subprocess.run(
        [vllm_python, script],
        env=server_environment(vllm_python),
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    made, exact = map(int, done.stdout.split()[-2:])
    assert (made == exact) == (not SATURATED), (made, exact)


def _logprobs(directory: Path, prompt: list[int], dtype: str = "float32") -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    return [float(row[token]) for row, token in zip(logits[:-1], prompt[1:], strict=True)]


def _distance(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
