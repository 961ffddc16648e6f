"""bench/gpu.py must work the day a GPU is there: its pieces, in tiny shapes, where there is none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(BENCH))
    specification = importlib.util.spec_from_file_location("gpu", BENCH / "gpu.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCH))


def test_the_random_checkpoint_is_a_model_that_transformers_runs(script: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = script.write_random(tmp_path / "tiny", script.TINY)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(2, 20)[None]).logits).all()


def test_the_shapes_are_those_of_gemma_2_9b(script: Any) -> None:
    """8.32 billion in linear layers, 0.92 in the embedding (arXiv 2408.00118, tables 1 and 2)."""
    from gemma_pack.gemma import decoder_linears, linear_shape

    config = script.GEMMA_2_9B
    linears = [name for layer in decoder_linears(config, "model.") for group in layer for name in group]
    weights = sum(rows * columns for rows, columns in (linear_shape(config, name) for name in linears))
    assert weights == 8_323_596_288
    assert weights + config["vocab_size"] * config["hidden_size"] == 9_241_100_288


def test_the_floor_counts_bytes_and_operations(script: Any, tmp_path: Path) -> None:
    base = script.write_random(tmp_path / "tiny", script.TINY)
    without, with_text = (script.floor_seconds(base, 8, tokens, "cpu", tmp_path) for tokens in (0, 1000))
    weights = 2 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512)
    embedding = 2 * 512 * 256
    assert without["bytes"] == pytest.approx(2 * embedding + 3 * weights, rel=0.01)
    assert without["operations"] == 0
    assert with_text["operations"] == 2 * 1000 * (weights + 2 * (3 * 256**2 + 512**2))
    assert with_text["seconds"] > 0


def test_the_text_is_long_enough(script: Any, tmp_path: Path) -> None:
    assert len(script.random_text(tmp_path / "t.txt", 1000).read_text("utf-8").split()) >= 1000
