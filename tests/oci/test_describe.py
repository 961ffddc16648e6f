from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from gemma_pack.console import Console
from gemma_pack.errors import CheckpointError, InvalidUsageError, OfflineError, RegistryError
from gemma_pack.oci.describe import describe
from gemma_pack.oci.layer_reader import MAX_SMALL_BYTES, WINDOW_BYTES
from gemma_pack.oci.layout import Layout
from gemma_pack.oci.manifest import CONFIG_TYPE, GZIP_LAYER_TYPE, LAYER_TYPE, MANIFEST_TYPE, Manifest
from gemma_pack.oci.manifest import describe as describe_blob
from gemma_pack.oci.package import package
from gemma_pack.oci.push import push
from tests.oci.faulty import Fault, Faulty, Handler, cut_download, quick
from tests.records import quantized_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oci.registry import Registry

QUIET = Console("quiet")
MIB = 1 << 20


@pytest.fixture
def recorded(tmp_path: Path, random_checkpoint: Callable[..., Path]) -> Path:
    """Return the layout of a checkpoint with a record and 10 MiB of weights."""
    directory = random_checkpoint(shards=2, size_bytes=5 * MIB)
    quantized_record().write(directory)
    package(directory, tmp_path / "recorded.oci", reporter=QUIET)
    return tmp_path / "recorded.oci"


def test_a_layout_is_described(recorded: Path):
    found = describe(recorded)
    layout = Layout.open(recorded)
    manifest = layout.manifests()[0][1]
    assert found.digest == layout.root.digest
    assert found.pinned is None
    assert found.name == str(recorded)
    assert found.platforms == ("linux/amd64", "linux/arm64")
    assert found.record == quantized_record()
    assert found.config["model_type"] == "gemma3_text"
    assert [layer.digest for layer in found.layers] == [layer.digest for layer in manifest.layers]
    assert found.size_bytes == manifest.config.size_bytes + sum(layer.size_bytes for layer in manifest.layers)


@pytest.mark.parametrize(
    ("name", "text", "answers"),
    [
        ("chat_template.jinja", "{{ messages }}", True),
        ("chat_template.json", "{}", True),
        ("tokenizer_config.json", '{"chat_template": "{{ messages }}"}', True),
        ("tokenizer_config.json", "{}", False),
    ],
)
def test_a_chat_template_is_found_wherever_it_is_kept(
    tmp_path: Path, raw_checkpoint: Callable[..., Path], name: str, text: str, *, answers: bool
):
    directory = raw_checkpoint()
    (directory / "chat_template.jinja").unlink()
    (directory / name).write_text(text, "utf-8")
    package(directory, tmp_path / "model.oci", reporter=QUIET)
    assert describe(tmp_path / "model.oci").has_chat_template is answers


def test_an_image_in_a_real_registry_is_described_the_same(registry: Registry, recorded: Path):
    result = push(recorded, f"{registry.host}/team/gemma:1", reporter=QUIET)
    found, local = describe(result.reference), describe(recorded)
    assert found.pinned == result.pinned
    assert found.name == result.reference
    assert (found.digest, found.record, found.config, found.layers, found.size_bytes, found.platforms) == (
        local.digest, local.record, local.config, local.layers, local.size_bytes, local.platforms,
    )  # fmt: skip
    assert describe(result.pinned).digest == found.digest


def test_only_a_window_of_each_weight_layer_is_asked_for(faulty: Faulty, recorded: Path):
    push(recorded, f"{faulty.host}/a/b:1", reporter=QUIET)
    faulty.seen.clear()
    describe(f"{faulty.host}/a/b:1")
    for layer in Layout.open(recorded).manifests()[0][1].layers:
        if (layer.title or "").startswith("model-"):
            (seen,) = (seen for seen in faulty.seen if layer.digest in seen.path)
            assert seen.headers["Range"] == f"bytes=0-{WINDOW_BYTES - 1}"


def test_without_a_record_there_is_none(random_layout: Callable[..., Path]):
    found = describe(random_layout(size_bytes=1000))
    assert found.record is None
    assert found.config["architectures"] == ["Gemma3ForCausalLM"]


def test_what_skopeo_recompressed_is_described_the_same(registry: Registry, recorded: Path, tool: Callable[[str], str]):
    reference = f"{registry.host}/team/gemma:1"
    subprocess.run(
        [tool("skopeo"), "copy", "--dest-tls-verify=false", f"oci:{recorded}", f"docker://{reference}"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    found, local = describe(reference), describe(recorded)
    assert all(layer.media_type.endswith("+gzip") for layer in found.layers)
    assert found.digest != local.digest
    assert (found.record, found.config) == (local.record, local.config)


def test_a_registry_that_knows_no_ranges_or_breaks_off_is_read_all_the_same(faulty: Faulty, recorded: Path):
    def whole(request: Handler) -> None:
        del request.headers["Range"]
        request._route(request.path, {})

    push(recorded, f"{faulty.host}/a/b:1", reporter=QUIET)
    faulty.faults = [Fault("GET", "blobs", cut_download(300), times=2), Fault("GET", "blobs", whole, times=99)]
    assert describe(f"{faulty.host}/a/b:1", retry=quick()).record == quantized_record()


def test_an_image_without_a_checkpoint_is_an_error(write_base: Callable[..., Path]):
    with pytest.raises(CheckpointError, match=r"has no /models/config\.json"):
        describe(write_base())


def forge(faulty: Faulty, layout: Path, change: Callable[[bytes], bytes]) -> str:
    """Push `layout` with its configuration changed, and all that names it made to fit."""
    reference = f"{faulty.host}/a/b:1"
    push(layout, reference, reporter=QUIET)
    manifest = Layout.open(layout).manifests()[0][1]
    (layer,) = (one for one in manifest.layers if one.title == "configuration.tar")
    data = change(faulty.blobs["a/b", layer.digest])
    forged = describe_blob(data, layer.media_type, annotations=layer.annotations)
    faulty.blobs["a/b", forged.digest] = data
    layers = tuple(forged if one == layer else one for one in manifest.layers)
    faulty.manifests["a/b", "1"] = (MANIFEST_TYPE, replace(manifest, layers=layers).encode())
    return reference


def test_a_broken_record_and_a_broken_config_are_errors(faulty: Faulty, recorded: Path):
    with pytest.raises(CheckpointError, match="no valid record"):
        describe(forge(faulty, recorded, lambda data: data.replace(b'"schema_version": 1', b'"schema_version": 9')))
    with pytest.raises(RegistryError, match=r"config\.json is not JSON"):
        describe(forge(faulty, recorded, lambda data: data.replace(b'"architectures"', b'"architectures!')))
    with pytest.raises(RegistryError, match="is no tar, or damaged"):
        describe(forge(faulty, recorded, lambda data: data.replace(b"ustar", b"!!!!!")))


def test_a_small_layer_is_checked_against_its_digest(faulty: Faulty, recorded: Path):
    push(recorded, f"{faulty.host}/a/b:1", reporter=QUIET)
    (layer,) = (one for one in Layout.open(recorded).manifests()[0][1].layers if one.title == "configuration.tar")
    data = faulty.blobs["a/b", layer.digest]
    faulty.blobs["a/b", layer.digest] = data.replace(b"gemma3_text", b"gemma4_text")
    with pytest.raises(RegistryError, match="another digest"):
        describe(f"{faulty.host}/a/b:1")
    faulty.blobs["a/b", layer.digest] = data[:-2000]
    with pytest.raises(RegistryError, match="shorter than the image says"):
        describe(f"{faulty.host}/a/b:1")


def test_files_in_one_large_layer_are_found_all_the_same(random_checkpoint: Callable[..., Path], faulty: Faulty):
    directory = random_checkpoint(shards=2, size_bytes=5 * MIB)
    quantized_record().write(directory)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        tar.add(directory, "models")
    for data, media_type in ((plain.getvalue(), LAYER_TYPE), (gzip.compress(plain.getvalue(), 1), GZIP_LAYER_TYPE)):
        layer, config = describe_blob(data, media_type), describe_blob(b"{}", CONFIG_TYPE)
        faulty.blobs["a/b", layer.digest] = data
        manifest = Manifest(config=config, layers=(layer,)).encode()
        faulty.manifests["a/b", "1"] = (MANIFEST_TYPE, manifest)
        assert describe(f"{faulty.host}/a/b:1").record == quantized_record()


def test_a_small_file_that_is_large_is_refused(tmp_path: Path, random_checkpoint: Callable[..., Path]):
    directory = random_checkpoint(size_bytes=1000)
    config = json.loads((directory / "config.json").read_text()) | {"filler": "x" * MAX_SMALL_BYTES}
    (directory / "config.json").write_text(json.dumps(config))
    package(directory, tmp_path / "large.oci", reporter=QUIET)
    with pytest.raises(RegistryError, match="4 MiB at most"):
        describe(tmp_path / "large.oci")


def test_what_is_not_there_is_an_error(tmp_path: Path, free_port: int, faulty: Faulty):
    with pytest.raises(InvalidUsageError, match="is not an OCI layout"):
        describe(tmp_path)
    with pytest.raises(OfflineError):
        describe(f"127.0.0.1:{free_port}/a/b:1")
    with pytest.raises(RegistryError, match="has no image a/b under 1"):
        describe(f"{faulty.host}/a/b:1")


def test_an_artifact_of_raw_files_is_described_by_its_titles(recorded: Path, registry: Registry, tmp_path: Path):
    directory = tmp_path / "model"  # what `recorded` was packaged from
    layout = package(directory, tmp_path / "raw.oci", kind="artifact", reporter=QUIET).layout
    result = push(layout, f"{registry.host}/team/raw:1", reporter=QUIET)
    for image in (layout, result.reference):
        found = describe(image)
        assert found.is_artifact
        assert found.record == quantized_record()
        assert found.config["model_type"] == "gemma3_text"
    assert not describe(recorded).is_artifact


def test_a_raw_file_that_is_not_what_its_digest_says_is_refused(faulty: Faulty, recorded: Path, tmp_path: Path):
    del recorded
    layout = package(tmp_path / "model", tmp_path / "raw.oci", kind="artifact", reporter=QUIET).layout
    push(layout, f"{faulty.host}/a/b:1", reporter=QUIET)
    (layer,) = (one for one in Layout.open(layout).manifests()[0][1].layers if one.title == "config.json")
    faulty.blobs["a/b", layer.digest] = b" " + faulty.blobs["a/b", layer.digest][1:]
    with pytest.raises(RegistryError, match="damaged"):
        describe(f"{faulty.host}/a/b:1", retry=quick())
