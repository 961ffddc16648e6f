"""Fixtures that several rooms share: real system tools, found or skipped, free loopback ports, a small checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import socket
from typing import TYPE_CHECKING

import pytest

from gemma_pack.checkpoint import TensorInfo, read_header, write_index, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Return the path of a system tool; skip the test where it is missing, or fail under CI=true."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path:
            return path
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is missing, and CI must have it: make tools installs it")
        pytest.skip(f"{name} is missing: make tools installs it on Debian")

    return find


@pytest.fixture
def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def raw_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a checkpoint whose weights are just bytes: whole, but nothing to compute with.

    For what handles files only; it needs no torch. `files` are added as they are, by path below the directory.
    """

    def write(name: str = "model", *, shards: int = 2, files: Mapping[str, str] | None = None) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        infos: list[TensorInfo] = []
        for number in range(1, shards + 1):
            file_name = f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
            data = bytes((number * 7 + i) % 251 for i in range(2 * 50 * 11))
            write_safetensors(
                directory / file_name, [(f"layers.{number}.weight", "BF16", (50, 11), lambda data=data: data)]
            )
            infos += read_header(directory / file_name)
        write_index(directory, infos)
        contents = {
            "config.json": json.dumps({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}),
            "generation_config.json": "{}",
            "tokenizer.json": json.dumps({"model": {"vocab": {"<bos>": 0, "▁a": 1}}}),
            "tokenizer_config.json": "{}",
            "chat_template.jinja": "{{ messages }}",
            "README.md": "# A model\n",
            **(files or {}),
        }
        for path, text in contents.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text, "utf-8")
        return directory

    return write
