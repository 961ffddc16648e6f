"""Whole-sized Gemmas that take no disk: real headers, and files that are nothing but a hole after them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from gemma_pack.checkpoint import write_index
from gemma_pack.gemma import text_config
from gemma_pack.quantization.shards import divide
from gemma_pack.safetensors_file import plan_safetensors, read_header
from gemma_pack.sources.outline import gemma3_shapes
from tests.deploy.conftest import CONFIGS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VOCABULARY = 262_144


@pytest.fixture
def hollow(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that lays out one of deploy's CONFIGS as a directory of holes."""

    def write(name: str) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        config = {**CONFIGS[name], "vocab_size": VOCABULARY}
        shapes = gemma3_shapes({**text_config(config), "vocab_size": VOCABULARY})
        if config["model_type"] == "gemma2":  # whose keys and queries have no norms
            shapes = {
                tensor: shape
                for tensor, shape in shapes.items()
                if not tensor.endswith(("q_norm.weight", "k_norm.weight"))
            }
        path = directory / "model-00001-of-00001.safetensors"
        header, infos = plan_safetensors(path, [(tensor, "BF16", shape) for tensor, shape in shapes.items()])
        del header
        files = []
        for number, shard in enumerate(divide(infos), start=1):
            path = directory / f"model-{number:05}.safetensors"
            header, placed = plan_safetensors(path, [(info.name, info.dtype, info.shape) for info in shard])
            with path.open("wb") as stream:
                stream.write(header)
                stream.truncate(placed[-1].end)
            files += read_header(path)
        write_index(directory, files)
        (directory / "config.json").write_text(json.dumps(config), "utf-8")
        (directory / "tokenizer.json").write_text("{}", "utf-8")
        return directory

    return write
