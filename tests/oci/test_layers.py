"""Layers: the same bytes as tar writers that people trust, from any offset, and never what must not be packed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import CheckpointError
from gemma_pack.oci.layers import MAX_WEIGHT_LAYERS, LayerEntry, LayerSource, plan_layers

if TYPE_CHECKING:
    from collections.abc import Callable


def whole(layer: LayerSource) -> bytes:
    return b"".join(layer.iter_chunks())


def plan(directory: Path) -> dict[str, LayerSource]:
    return {layer.title: layer for layer in plan_layers(Checkpoint.open(directory))}


def members(layer: LayerSource) -> list[str]:
    return [entry.name for entry in layer.entries]


def test_a_layer_equals_what_tarfile_writes(raw_checkpoint: Callable[..., Path]) -> None:
    layer = plan(raw_checkpoint(files={"sub/deep/notes.json": "{}"}))["configuration.tar"]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for entry in layer.entries:
            info = tarfile.TarInfo(entry.name.rstrip("/"))
            if entry.source:
                info.size, info.mode = entry.size_bytes, 0o644
                tar.addfile(info, io.BytesIO(entry.source.read_bytes()))
            else:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
    assert whole(layer) == archive.getvalue()[: layer.size_bytes]
    assert not archive.getvalue()[layer.size_bytes :].strip(b"\0")  # tarfile pads to 10 KiB records


def test_gnu_tar_lists_a_layer(raw_checkpoint: Callable[..., Path], tool: Callable[[str], str]) -> None:
    directory = raw_checkpoint(files={"a" * 120 + ".json": "{}", "größe.json": "{}"})
    layer = plan(directory)["configuration.tar"]
    listed = subprocess.run(
        [tool("tar"), "--list", "--verbose", "--numeric-owner", "--full-time", "--utc", "--quoting-style=literal"],
        input=whole(layer),
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    ).stdout.decode()
    lines = [re.split(r"\s+", line, maxsplit=5) for line in listed.splitlines()]
    assert [line[5] for line in lines] == members(layer)
    assert {(line[0], line[1], line[3], line[4]) for line in lines} == {
        ("drwxr-xr-x", "0/0", "1970-01-01", "00:00:00"),
        ("-rw-r--r--", "0/0", "1970-01-01", "00:00:00"),
    }


def test_the_size_is_known_before_anything_is_read(raw_checkpoint: Callable[..., Path]) -> None:
    for layer in plan(raw_checkpoint()).values():
        assert layer.size_bytes == len(whole(layer))
    entry = LayerEntry(name="models/model.safetensors", source=Path("/does/not/exist"), size_bytes=20 << 30)
    assert LayerSource(entries=(entry,)).size_bytes == (20 << 30) + 512 + 1024


@given(start=st.integers(0, 9000))
def test_a_layer_can_be_read_from_any_offset(tmp_path_factory: pytest.TempPathFactory, start: int) -> None:
    path = tmp_path_factory.getbasetemp() / "offset"
    path.write_bytes(bytes(range(256)) * 9)
    entry = LayerEntry(name="models/" + "n" * 150, source=path, size_bytes=256 * 9)
    layer = LayerSource(entries=(LayerEntry(name="models/"), entry, entry))
    assert b"".join(layer.iter_chunks(start)) == whole(layer)[start:]


def test_shards_have_a_layer_each_and_small_files_are_grouped(raw_checkpoint: Callable[..., Path]) -> None:
    layers = plan(raw_checkpoint(files={"LICENSE": "terms", "report.json": "{}", "gemma-pack.json": "{}"}))
    assert list(layers) == [
        "tokenizer.tar",
        "model-00001-of-00002.safetensors.tar",
        "model-00002-of-00002.safetensors.tar",
        "configuration.tar",
        "documents.tar",
    ]
    assert members(layers["tokenizer.tar"]) == [
        "models/",
        "models/chat_template.jinja",
        "models/tokenizer.json",
        "models/tokenizer_config.json",
    ]
    assert members(layers["configuration.tar"]) == [
        "models/",
        "models/config.json",
        "models/gemma-pack.json",
        "models/generation_config.json",
        "models/model.safetensors.index.json",
    ]
    assert members(layers["documents.tar"]) == ["models/", "models/LICENSE", "models/README.md", "models/report.json"]
    shard = layers["model-00001-of-00002.safetensors.tar"]
    assert members(shard) == ["models/", "models/model-00001-of-00002.safetensors"]
    assert shard.annotations["olot.layer.content.inlayerpath"] == "/models/model-00001-of-00002.safetensors"


def test_many_shards_share_layers(raw_checkpoint: Callable[..., Path]) -> None:
    layers = plan_layers(Checkpoint.open(raw_checkpoint(shards=70)))
    weights = [layer for layer in layers if layer.title.startswith("weights-")]
    assert len(weights) == 24 <= MAX_WEIGHT_LAYERS
    packed = [entry.name for layer in weights for entry in layer.files]
    assert packed == [f"models/model-{number:05d}-of-00070.safetensors" for number in range(1, 71)]


def test_subdirectories_are_kept_and_hidden_files_left_out(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint(
        files={"sub/deep/config.json": "{}", ".cache/x.json": "{}", ".gitattributes": "", "sub/.hidden": ""}
    )
    names = members(plan(directory)["configuration.tar"])
    assert names[:3] == ["models/", "models/sub/", "models/sub/deep/"]
    assert "models/sub/deep/config.json" in names
    assert "models/config.json" in names
    assert not [name for name in names if "/." in name]


def test_nothing_of_the_machine_shows_in_the_bytes(raw_checkpoint: Callable[..., Path]) -> None:
    first, second = raw_checkpoint("first"), raw_checkpoint("elsewhere/second")
    for path in second.rglob("*"):
        path.chmod(0o600)
        os.utime(path, (2_000_000_000, 2_000_000_000))
    os.chown(second / "config.json", *((1000, 1000) if os.geteuid() == 0 else (os.getuid(), os.getgid())))
    assert [whole(layer) for layer in plan(first).values()] == [whole(layer) for layer in plan(second).values()]


def test_links_inside_the_directory_are_followed(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    (directory / "alias.json").symlink_to("config.json")
    with tarfile.open(fileobj=io.BytesIO(whole(plan(directory)["configuration.tar"]))) as tar:
        assert tar.getmember("models/alias.json").isreg()
        stream = tar.extractfile("models/alias.json")
        assert stream
        assert stream.read() == (directory / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "x.json").symlink_to("/etc/passwd"), "link that leaves"),
        (lambda d: (d / "folder").symlink_to("/etc"), "link that leaves"),
        (lambda d: (d / "x.json").symlink_to("missing"), "neither a file nor a directory"),
        (lambda d: (d / "loop.json").symlink_to("loop.json"), "neither a file nor a directory"),
        (lambda d: (d / "self").symlink_to("."), "neither a file nor a directory"),
        (lambda d: os.mkfifo(d / "pipe.json"), "neither a file nor a directory"),
        (lambda d: (d / "training_args.bin").write_bytes(b"\x80"), "pickle"),
        (lambda d: (d / "old.safetensors").write_bytes(b""), "not a part of the checkpoint"),
        (lambda d: Path(os.fsdecode(os.fsencode(d) + b"/\xff.json")).write_bytes(b""), "not UTF-8"),
    ],
)
def test_what_must_not_be_packed_is_refused(
    raw_checkpoint: Callable[..., Path], spoil: Callable[[Path], object], message: str
) -> None:
    directory = raw_checkpoint()
    spoil(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        plan(directory)
    assert caught.value.hint


@pytest.mark.parametrize("change", [lambda p: p.write_bytes(b"longer" * 9), lambda p: p.write_bytes(b""), Path.unlink])
def test_a_file_that_changes_between_plan_and_reading_is_noticed(
    raw_checkpoint: Callable[..., Path], change: Callable[[Path], object]
) -> None:
    directory = raw_checkpoint()
    layer = plan(directory)["documents.tar"]
    change(directory / "README.md")
    with pytest.raises(CheckpointError, match=r"README\.md changed while it was packed"):
        whole(layer)
