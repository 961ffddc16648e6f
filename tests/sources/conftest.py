from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.sources.hub_server import Hub, HubServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = "google/tiny-gemma"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Iterator[Hub]:
    """Serve a tiny Gemma, with much around it that nobody needs, as google/tiny-gemma; isolate caches and login."""
    from huggingface_hub import constants

    from gemma_pack.sources import transfer

    monkeypatch.setattr(transfer, "_PAUSE_S", 0.0)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path / "cache"))
    files = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    surplus = {
        "README.md": b"---\nlicense: gemma\n---\n# Tiny\n",
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "pytorch_model.bin": b"\x80\x02pickle" * 2000,
        "consolidated.safetensors": b"another copy" * 2000,
        "original/params.json": b"{}",
        "model.gguf": b"GGUF" * 5000,
    }
    with HubServer() as hub:
        hub.add(MODEL, files | surplus)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
