"""Looking at an image: what is found, and what it costs in bytes, counted on the wire."""

from __future__ import annotations

import json
import random
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from gemma_pack.console import Console
from gemma_pack.errors import CheckpointError, InvalidUsageError, RegistryError
from gemma_pack.oci import layer_reader
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.compatibility import check_compatibility
from gemma_pack.oci.inspection import inspect, model_path
from gemma_pack.oci.layout import Layout
from gemma_pack.oci.lint import judge, lint
from gemma_pack.oci.manifest import (
    CONFIG_TYPE,
    LAYER_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    Manifest,
    Platform,
    describe,
    encode_json,
)
from gemma_pack.oci.package import package
from gemma_pack.oci.push import push
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.tar_header import DIRECTORY, END, REGULAR, member_header, padded
from tests.oci.faulty import Fault, Faulty, Handler, cut_download, quick
from tests.oci.gemma_images import Image, image, member, model, safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.oci.registry import Registry

QUIET = Console("quiet")
NINE_B = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "dtype": "bfloat16", "hidden_size": 3584,
    "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 256, "vocab_size": 256_000,
}  # fmt: skip
"""google/gemma-2-9b's own numbers."""


class Counter:
    """A proxy before a registry that counts what passes in both directions."""

    def __init__(self, host: str) -> None:
        self._target = (host.partition(":")[0], int(host.partition(":")[2]))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.bytes = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for one in (self._server, *self._sockets):
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.create_connection(self._target, 10)
            self._sockets += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(1 << 16):
                self.bytes += len(data)
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            return


@contextmanager
def counted(host: str) -> Iterator[Counter]:
    counter = Counter(host)
    try:
        yield counter
    finally:
        counter.close()


def nine_b_tensors() -> dict[str, tuple[int, ...]]:
    sizes = {"q_proj": (4096, 3584), "k_proj": (2048, 3584), "v_proj": (2048, 3584), "o_proj": (3584, 4096)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (256_000, 3584), "model.norm.weight": (3584,)
    }  # fmt: skip
    for layer in range(42):
        for name, shape in sizes.items():
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = shape
        for name, shape in {"gate_proj": (14336, 3584), "up_proj": (14336, 3584), "down_proj": (3584, 14336)}.items():
            shapes[f"model.layers.{layer}.mlp.{name}.weight"] = shape
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"model.layers.{layer}.{name}_layernorm.weight"] = (3584,)
    return shapes


def put_sparse(registry: Registry, repository: str, number: int, begin: bytes, size_bytes: int) -> Descriptor:
    """Let the registry have a blob of `size_bytes` that begins so and takes no space; its digest is made up."""
    hex_digest = f"{number:064x}"
    path = registry.blob(f"sha256:{hex_digest}")
    path.parent.mkdir(parents=True)
    with path.open("wb") as stream:
        stream.write(begin)
        stream.truncate(size_bytes)
    link = registry.directory / f"data/docker/registry/v2/repositories/{repository}/_layers/sha256/{hex_digest}/link"
    link.parent.mkdir(parents=True)
    link.write_text(f"sha256:{hex_digest}")
    title = {"org.opencontainers.image.title": f"model-{number}.safetensors.tar"}
    return Descriptor(media_type=LAYER_TYPE, digest=f"sha256:{hex_digest}", size_bytes=size_bytes, annotations=title)


def push_nine_b(registry: Registry) -> tuple[str, int]:
    """Push an image of the size of gemma-2-9b in bf16, weights being holes, and return its name and size in bytes."""
    repository, shapes = "team/nine-b", nine_b_tensors()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * _count(one) for one in shards[-1].values()) > 4_000_000_000:
            shards.append({})
        shards[-1][name] = shape
    layers, weight_map = [], {}
    for number, shard in enumerate(shards, 1):
        header, position = {}, 0
        for name, shape in shard.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + 2 * _count(shape)]}
            position += 2 * _count(shape)
            weight_map[name] = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        head = json.dumps(header).encode()
        size = 8 + len(head) + position
        begin = member_header("models/", 0, 0o755, DIRECTORY)
        begin += member_header(f"models/model-{number:05d}-of-{len(shards):05d}.safetensors", size, 0o644, REGULAR)
        total = len(begin) + padded(size) + len(END)
        layers.append(put_sparse(registry, repository, number, begin + len(head).to_bytes(8, "little") + head, total))
    rest = {"config.json": json.dumps(NINE_B), "model.safetensors.index.json": json.dumps({"weight_map": weight_map})}
    tokenizer = {"chat_template.jinja": "{{ messages }}", "tokenizer.json": "x" * 17_000_000}
    blobs = [_small_layer({name: text.encode() for name, text in files.items()}) for files in (tokenizer, rest)]
    descriptors = [
        describe(data, LAYER_TYPE, annotations={"org.opencontainers.image.title": "x.tar"}) for data in blobs
    ]
    every = [descriptors[0], *layers, descriptors[1]]
    config = encode_json({"rootfs": {"type": "layers", "diff_ids": [one.digest for one in every]}, "config": {
        "Entrypoint": ["/bin/link-model-and-wait"]}})  # fmt: skip
    manifest = Manifest(config=describe(config, CONFIG_TYPE), layers=tuple(every))
    reference = parse_reference(f"{registry.host}/{repository}:1")
    with RegistryClient(reference, writable=True) as client:
        for data in (config, *blobs):
            client.put_blob(client.start_upload(), describe(data, LAYER_TYPE).digest, [data], len(data))
        client.put_manifest("1", manifest.encode(), MANIFEST_TYPE)
    return repository, sum(layer.size_bytes for layer in every)


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def _small_layer(files: dict[str, bytes]) -> bytes:
    parts = [member_header("models/", 0, 0o755, DIRECTORY)]
    for name, data in files.items():
        parts += [member_header(f"models/{name}", len(data), 0o644, REGULAR), data.ljust(padded(len(data)), b"\0")]
    return b"".join(parts) + END


def test_an_image_of_18_gigabytes_costs_its_headers(registry: Registry):
    repository, size_bytes = push_nine_b(registry)
    assert size_bytes > 18_000_000_000
    with counted(registry.host) as counter:
        found = check_compatibility(f"{counter.host}/{repository}:1")
    assert (found.tensors, found.weights_bytes) == (464, 2 * sum(map(_count, nine_b_tensors().values())))
    assert {one.consumer for one in found.judgements if one.verdict == "works"} == {
        "modelcar", "native", "fetch", "containerd",
    }  # fmt: skip
    assert found.bytes_read < counter.bytes
    needed = 2 * len(json.dumps(nine_b_tensors()))  # the names and shapes that the headers have, the names of the index
    assert counter.bytes < 2.5 * needed < size_bytes / 100_000


def noisy(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return files whose weights do not shrink by compression, as real ones do not."""
    begins = {name: 8 + int.from_bytes(data[:8], "little") for name, data in files.items() if "safetensors" in name}
    noise = random.Random(1).randbytes(max(map(len, files.values())))  # noqa: S311 - test data
    return files | {name: (files[name][:begin] + noise)[: len(files[name])] for name, begin in begins.items()
                    if name.endswith(".safetensors")}  # fmt: skip


def test_registry_and_layout_say_the_same(faulty: Faulty, tmp_path: Path):
    layout = image().write(tmp_path / "image")
    push(layout, f"{faulty.host}/a/b:1", reporter=QUIET)
    local, remote = inspect(layout), inspect(f"{faulty.host}/a/b:1")
    assert remote.pinned == f"{faulty.host}/a/b@{local.root.digest}"
    assert local.pinned is None
    assert replace(remote, name=local.name, pinned=None) == local
    assert {name for name in local.files if name.endswith("safetensors")} == set(local.shards)


def test_a_registry_that_stumbles_or_knows_no_ranges_is_read_all_the_same(faulty: Faulty, tmp_path: Path):
    def whole(request: Handler) -> None:
        del request.headers["Range"]
        request._route(request.path, {})

    push(image().write(tmp_path / "image"), f"{faulty.host}/a/b:1", reporter=QUIET)
    faulty.faults = [Fault("GET", "blobs", cut_download(100), times=2), Fault("GET", "blobs", whole, times=99)]
    assert len(inspect(f"{faulty.host}/a/b:1", retry=quick()).shards) == 2


@pytest.mark.parametrize("kind", [LAYER_TYPE, LAYER_TYPE + "+gzip"])
def test_large_layers_are_read_in_part(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, faulty: Faulty):
    monkeypatch.setattr(layer_reader, "MAX_INFLATED_BYTES", 100_000)
    tensors = {"a.weight": ("BF16", (1000, 1000)), "b.weight": ("BF16", (1000, 1000))}
    push(image(noisy(model(tensors)), kind=kind).write(tmp_path / "image"), f"{faulty.host}/a/b:1", reporter=QUIET)
    found = inspect(f"{faulty.host}/a/b:1")
    names = {tensor.name for shard in found.shards.values() if isinstance(shard, tuple) for tensor in shard}
    assert names == set(tensors)
    assert found.bytes_read < 60_000
    assert found.is_read == (kind == LAYER_TYPE)


def test_what_lies_behind_a_gzipped_shard_is_unknown_and_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layer_reader, "MAX_INFLATED_BYTES", 1000)
    files = model({"a.weight": ("U8", (4_000_000,))})
    base, *layers = image(files).layers
    all_in_one = tuple(part for layer in layers for part in layer)
    types, titles = (LAYER_TYPE, LAYER_TYPE + "+gzip"), (None, "all.tar")
    one = Image(layers=(base, all_in_one), types=types, titles=titles)
    monkeypatch.setattr("gemma_pack.oci.inspection._WHOLE_BYTES", 10)
    found = inspect(one.write(tmp_path / "image"))
    severities = {finding.rule: finding.severity for finding in lint(found) if finding.rule in {"tokenizer", "index"}}
    assert severities == {"tokenizer": "unknown", "index": "unknown"}
    assert {one.consumer: one.verdict for one in judge(lint(found))}["native"] == "unknown"


def test_zstd_fails_for_fetch_and_is_unknown_to_others(tmp_path: Path):
    odd = image(kind=LAYER_TYPE + "+zstd")
    verdicts = {one.consumer: one.verdict for one in judge(lint(inspect(odd.write(tmp_path / "image"))))}
    assert verdicts["fetch"] == "fails"
    assert {verdicts["modelcar"], verdicts["native"], verdicts["containerd"]} == {"unknown"}


def test_later_layers_lie_over_earlier_ones(tmp_path: Path):
    config = json.dumps({"model_type": "llama"}).encode()
    changed = image().add(member("models/config.json", config), member("models/.wh.tokenizer.json"))
    found = inspect(changed.write(tmp_path / "image"))
    assert found.contents["config.json"] == config
    assert "tokenizer.json" not in found.files
    emptied = image().add(member("models/.wh..wh..opq"), member("models/new.txt"))
    assert set(inspect(emptied.write(tmp_path / "emptied")).files) == {"new.txt"}
    gone = image().add(member(".wh.models"))
    assert inspect(gone.write(tmp_path / "gone")).files == {}


@pytest.mark.parametrize(
    ("name", "path"),
    [("models/a/b", "a/b"), ("./models/a", "a"), ("/models//a", "a"), ("models", ""), ("model/a", None), ("etc", None),
     ("models/../etc/x", None)],
)  # fmt: skip
def test_the_place_of_a_member(name: str, path: str | None):
    assert model_path(name) == path


def test_a_chat_template_in_the_tokenizers_config_counts(tmp_path: Path):
    there = b'{"chat_template": "{{ messages }}"}'
    files = model(chat__template_jinja=None, tokenizer__config_json=there)
    for number, kind in enumerate((LAYER_TYPE, LAYER_TYPE + "+gzip")):
        found = inspect(image(files, kind=kind).write(tmp_path / str(number)))
        assert found.contents["tokenizer_config.json"] == there
        assert "chat-template" not in {finding.rule for finding in lint(found)}
    directory = tmp_path / "model"
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    raw = package(directory, tmp_path / "raw", kind="artifact", reporter=QUIET).layout
    assert "chat-template" not in {finding.rule for finding in lint(inspect(raw))}


def test_a_base_that_links_and_waits_is_not_read(tmp_path: Path):
    directory = tmp_path / "model"
    directory.mkdir()
    for name, data in model().items():
        (directory / name).write_bytes(data)
    found = inspect(package(directory, tmp_path / "image", reporter=QUIET).layout)
    assert [layer.reading for layer in found.layers][:2] == ["base", "whole"]
    assert found.programs is None
    assert found.platforms == (Platform("linux", "amd64"), Platform("linux", "arm64"))


def test_a_header_that_is_none_is_kept_as_the_error_that_it_is(tmp_path: Path):
    files = model() | {"model-00001-of-00002.safetensors": b"\xff" * 100}
    for layout in (
        image(files).write(tmp_path / "image"),
        image(files | {"x.safetensors": b"1"}).write(tmp_path / "x"),
    ):
        assert isinstance(inspect(layout).shards["model-00001-of-00002.safetensors"], CheckpointError)
    assert isinstance(inspect(tmp_path / "x").shards["x.safetensors"], CheckpointError)


def test_a_long_header_takes_one_request_more(faulty: Faulty, tmp_path: Path):
    tensors = {f"layer.{number}.weight": ("BF16", (1, 1)) for number in range(2000)}
    assert len(safetensors(tensors)) > 10 * layer_reader.WINDOW_BYTES
    layout = image(model(tensors)).write(tmp_path / "image")
    push(layout, f"{faulty.host}/a/b:1", reporter=QUIET)
    faulty.seen.clear()
    found = inspect(f"{faulty.host}/a/b:1")
    shard = next(one for one in Layout.open(layout).manifests()[0][1].layers if (one.title or "").startswith("model-"))
    assert faulty.count("GET", shard.digest) <= 3
    assert sum(len(one) for one in found.shards.values() if isinstance(one, tuple)) == 2000


def test_what_is_not_there_or_damaged_is_an_error(faulty: Faulty, tmp_path: Path):
    with pytest.raises(InvalidUsageError, match="is not an OCI layout"):
        inspect(tmp_path)
    layout = image().write(tmp_path / "image")
    push(layout, f"{faulty.host}/a/b:1", reporter=QUIET)
    config = Layout.open(layout).manifests()[0][1].config
    faulty.blobs["a/b", config.digest] = faulty.blobs["a/b", config.digest].replace(b"amd64", b"arm64")
    with pytest.raises(RegistryError, match=r"configuration sha256:.* is damaged"):
        inspect(f"{faulty.host}/a/b:1")


def test_a_header_or_a_layer_without_end_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = image(model()).write(tmp_path / "image")
    monkeypatch.setattr(layer_reader, "MAX_HEADER_BYTES", 64)
    with pytest.raises(RegistryError, match="safetensors header of"):
        inspect(built)
    monkeypatch.setattr(layer_reader, "MAX_HEADER_BYTES", 1 << 20)
    monkeypatch.setattr(layer_reader, "MAX_MEMBERS", 1)
    with pytest.raises(RegistryError, match="more than 1 files"):
        inspect(built)
