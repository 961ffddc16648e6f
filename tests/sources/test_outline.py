"""A model by its headers: the same from a hub, a directory and the caches, for a few kilobytes of requests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from gemma_pack.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, write_index
from gemma_pack.console import Console
from gemma_pack.errors import AccessError, CheckpointError, InvalidUsageError, OfflineError, SourceError
from gemma_pack.safetensors_file import read_header, write_safetensors
from gemma_pack.sources import obtain, outline
from tests.sources.conftest import MODEL
from tests.sources.hub_server import TOKEN
from tests.sources.test_hub import fill_library_cache

if TYPE_CHECKING:
    from pathlib import Path

    from tests.sources.hub_server import Hub


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}


def test_a_hub_tells_the_shapes_for_the_headers_alone(
    hub: Hub, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outline, "FIRST_BYTES", 64)  # less than a header: the rest is asked for
    found = outline.outline(MODEL)
    whole = Checkpoint.open(tiny_checkpoint)
    assert shapes(found.checkpoint) == shapes(whole)
    assert found.checkpoint.config == whole.config
    assert found.checkpoint.size_bytes == whole.size_bytes
    assert found.revision == hub.commits[MODEL]
    assert found.fetch_bytes > whole.size_bytes
    assert set(found.digests) == {SINGLE_NAME}
    assert found.companions["tokenizer.json"] == (tiny_checkpoint / "tokenizer.json").stat().st_size
    asked = hub.fetched(SINGLE_NAME)
    assert [request.headers["range"].partition("-")[0] for request in asked] == ["bytes=0", "bytes=0"]
    assert max(int(request.headers["range"].rpartition("-")[2]) for request in asked) < 20_000
    assert not hub.fetched("tokenizer.json")


def test_a_hub_without_ranges_is_left_after_the_header(hub: Hub, tiny_checkpoint: Path) -> None:
    hub.ranges = False
    assert shapes(outline.outline(MODEL).checkpoint) == shapes(Checkpoint.open(tiny_checkpoint))


def test_shards_are_those_of_the_index(hub: Hub, tiny_checkpoint: Path, tmp_path: Path) -> None:
    infos = list(Checkpoint.open(tiny_checkpoint).tensors.values())
    for number, part in enumerate((infos[:5], infos[5:]), start=1):
        path = tmp_path / f"model-{number:05}-of-00002.safetensors"
        write_safetensors(path, [(info.name, info.dtype, info.shape, info.read) for info in part])
    write_index(tmp_path, [info for path in sorted(tmp_path.glob("*.safetensors")) for info in read_header(path)])
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    files["config.json"] = (tiny_checkpoint / "config.json").read_bytes()
    hub.add(MODEL, files)
    found = outline.outline(MODEL)
    assert shapes(found.checkpoint) == shapes(Checkpoint.open(tiny_checkpoint))
    del files["model-00002-of-00002.safetensors"]
    hub.add(MODEL, files)
    with pytest.raises(SourceError, match="has no model-00002"):
        outline.outline(MODEL)
    for index in (b"[]", b"{", b'{"weight_map": []}'):
        hub.add(MODEL, {**files, INDEX_NAME: index})
        with pytest.raises((SourceError, CheckpointError)):
            outline.outline(MODEL)


def test_what_was_fetched_is_read_from_disk(hub: Hub) -> None:
    with pytest.raises(OfflineError, match="switched off"):
        outline.outline(MODEL, offline=True)
    obtain(MODEL, revision=None, output=None, offline=False, reporter=Console("quiet"))
    before = len(hub.requests)
    for found in (outline.outline(MODEL, offline=True), outline.outline(MODEL, revision=hub.commits[MODEL])):
        assert found.fetch_bytes == 0
        assert found.revision == hub.commits[MODEL]
        assert set(found.digests) == {SINGLE_NAME}
    assert len(hub.requests) - before == 1  # of the two, the second asks what the commit is


def test_a_library_cache_without_the_weights_is_not_enough_offline(hub: Hub, tmp_path: Path) -> None:
    blobs = fill_library_cache(hub, tmp_path / "hf")
    (blobs.parent / "snapshots" / hub.commits[MODEL] / SINGLE_NAME).unlink()
    with pytest.raises(OfflineError, match=f"{SINGLE_NAME} of {MODEL} is not on this machine") as caught:
        outline.outline(MODEL, offline=True)
    assert caught.value.exit_code == 14


def test_a_directory_of_the_library_cache_goes_by_the_models_id(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commits[MODEL]
    found = outline.outline(str(fill_library_cache(hub, tmp_path / "hf").parent / "snapshots" / commit))
    assert (found.model_id, found.revision, found.fetch_bytes) == (MODEL, commit, 0)


def test_a_gated_model_asks_for_the_licence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(MODEL)
    with pytest.raises(AccessError):
        outline.outline(MODEL)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.granted = True
    assert outline.outline(MODEL).checkpoint.size_bytes


def test_a_corrupt_config_is_not_believed(hub: Hub) -> None:
    hub.corrupt.add("config.json")
    with pytest.raises(SourceError, match="does not match"):
        outline.outline(MODEL)


def test_what_cannot_be_quantized_is_refused_as_by_quantize(hub: Hub, tiny_checkpoint: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    config = json.loads(files["config.json"])
    hub.add(MODEL, files | {"config.json": json.dumps({**config, "model_type": "llama"}).encode()})
    with pytest.raises(CheckpointError, match="not a Gemma"):
        outline.outline(MODEL)
    hub.add(MODEL, files | {SINGLE_NAME: files[SINGLE_NAME].replace(b'"BF16"', b'"F16" ')})
    with pytest.raises(CheckpointError, match="float16"):
        outline.outline(MODEL)
    with pytest.raises(InvalidUsageError):
        outline.outline("no such thing")


@pytest.mark.real
def test_the_demo_before_it_is_assembled_is_what_it_will_be(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path))
    found = outline.outline("demo")
    whole = Checkpoint.open(demo_checkpoint)
    assert shapes(found.checkpoint) == shapes(whole)
    assert found.checkpoint.size_bytes == found.fetch_bytes == whole.size_bytes
    assert found.checkpoint.config == whole.config
