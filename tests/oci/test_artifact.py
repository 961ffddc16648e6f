"""The artifact of raw files: what ilab, oras and ModelPack readers go by, and files that arrive as they were."""

from __future__ import annotations

import hashlib
import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.console import Console
from gemma_pack.errors import CheckpointError, InvalidUsageError
from gemma_pack.oci.artifact import plan_artifact
from gemma_pack.oci.base import BaseChoice
from gemma_pack.oci.layout import Layout
from gemma_pack.oci.manifest import Platform
from gemma_pack.oci.package import package
from gemma_pack.oci.push import push
from gemma_pack.record import QuantizationRecord, Record, SourceRecord, UntouchedProof

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RECORD = Record(
    source=SourceRecord(kind="hub", model_id="google/gemma-2-9b-it", revision="c" * 40, files=()),
    quantization=QuantizationRecord(
        recipe="w4a16",
        recipe_sha256="1" * 64,
        scheme="int4 weights in groups of 128",
        algorithm="gptq",
        device="cpu",
        versions={},
        untouched=UntouchedProof(changed=(), untouched=3, sha256="2" * 64),
        base_size_bytes=18_483_411_968,
        size_bytes=1,
    ),
)


@pytest.fixture
def checkpoint(raw_checkpoint: Callable[..., Path]) -> Path:
    return raw_checkpoint(
        files={
            "config.json": json.dumps({"model_type": "gemma2", "dtype": "bfloat16", "quantization_config": {}}),
            "tokenizer_config.json": '{"a": 1}',
            "LICENSE": "terms",
        }
    )


def pack(directory: Path, console: Console | None = None) -> Path:
    target = directory.parent / "artifact.oci"
    return package(directory, target, kind="artifact", reporter=console or Console("quiet")).layout


def read(layout: Path, digest: str) -> Any:
    return json.loads((layout / "blobs" / digest.replace(":", "/")).read_text())


def root(layout: Path) -> tuple[dict[str, Any], Any]:
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    return entry, read(layout, entry["digest"])


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def ilab_files(layout: Path) -> dict[str, Path]:
    """Return name to blob by the rules of `_build_oci_model_file_map` in instructlab's model/download.py.

    The first entry of index.json that is an image manifest counts; each layer must have a title; a blob has one name.
    """
    manifests = json.loads((layout / "index.json").read_text())["manifests"]
    first = next(m for m in manifests if m["mediaType"] == "application/vnd.oci.image.manifest.v1+json")
    names = {
        layer["digest"]: layer["annotations"]["org.opencontainers.image.title"]
        for layer in read(layout, first["digest"])["layers"]
    }
    return {name: layout / "blobs" / digest.replace(":", "/") for digest, name in names.items()}


def test_the_digests_are_those_of_the_files(checkpoint: Path) -> None:
    _, manifest = root(pack(checkpoint))
    digests = {layer["annotations"]["org.opencontainers.image.title"]: layer["digest"] for layer in manifest["layers"]}
    assert digests == {
        name: f"sha256:{hashlib.sha256(data).hexdigest()}" for name, data in contents(checkpoint).items()
    }


def test_model_pack_readers_find_types_paths_and_modes(checkpoint: Path) -> None:
    # What modctl goes by when it extracts (pkg/backend/extract.go, pkg/codec/raw.go), and spec.md of the model-spec.
    entry, manifest = root(pack(checkpoint))
    assert entry["mediaType"] == manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert entry["artifactType"] == manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    types = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest["layers"]}
    assert {name: kind.removeprefix("application/vnd.cncf.model.") for name, kind in types.items()} == {
        "LICENSE": "doc.v1.raw",
        "README.md": "doc.v1.raw",
        "chat_template.jinja": "weight.config.v1.raw",
        "config.json": "weight.config.v1.raw",
        "generation_config.json": "weight.config.v1.raw",
        "model-00001-of-00002.safetensors": "weight.v1.raw",
        "model-00002-of-00002.safetensors": "weight.v1.raw",
        "model.safetensors.index.json": "weight.config.v1.raw",
        "tokenizer.json": "weight.config.v1.raw",
        "tokenizer_config.json": "weight.config.v1.raw",
    }
    for layer in manifest["layers"]:
        attributes = json.loads(layer["annotations"]["org.cncf.model.file.metadata+json"])
        assert attributes["size"] == layer["size"]
        assert (attributes["mode"], attributes["uid"], attributes["gid"]) == (0o644, 0, 0)


def test_the_config_says_what_the_record_knows(
    checkpoint: Path, valid_model_pack: Callable[[Any], None], valid_oci: Callable[[str, Any], None]
) -> None:
    RECORD.write(checkpoint)
    layout = pack(checkpoint)
    _, manifest = root(layout)
    config = read(layout, manifest["config"]["digest"])
    assert config["config"] == {
        "architecture": "transformer",
        "format": "safetensors",
        "paramSize": "9.2B",
        "precision": "bfloat16",
        "quantization": "gptq",
    }
    assert config["descriptor"] == {
        "createdAt": "1970-01-01T00:00:00Z",
        "family": "gemma2",
        "name": "gemma-2-9b-it-quantized.w4a16",
        "title": "gemma-2-9b-it-quantized.w4a16",
        "description": (
            f"google/gemma-2-9b-it at {'c' * 40}, quantized by recipe w4a16: int4 weights in groups of 128."
        ),
        "sourceURL": "https://huggingface.co/google/gemma-2-9b-it",
        "revision": "c" * 40,
        "licenses": ["LicenseRef-gemma"],
    }
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    valid_model_pack(config)
    valid_oci("image-manifest", manifest)


@pytest.mark.parametrize(
    ("quantization_config", "technical"),
    [(None, {"paramSize": "1.1K"}), ({"quant_method": "bitsandbytes"}, {"quantization": "bitsandbytes"})],
)
def test_without_a_record_only_what_can_be_counted_is_said(
    raw_checkpoint: Callable[..., Path],
    valid_model_pack: Callable[[Any], None],
    quantization_config: dict[str, str] | None,
    technical: dict[str, str],
) -> None:
    config = {"model_type": "gemma2", "torch_dtype": "bfloat16"}
    if quantization_config:
        config |= {"quantization_config": quantization_config}
    layout = pack(raw_checkpoint(files={"config.json": json.dumps(config)}))
    described = read(layout, root(layout)[1]["config"]["digest"])
    expected = {"architecture": "transformer", "format": "safetensors", "precision": "bfloat16", **technical}
    assert described["config"] == expected
    valid_model_pack(described)


def test_ilab_finds_every_file(checkpoint: Path) -> None:
    files = ilab_files(pack(checkpoint))
    assert {name: path.read_bytes() for name, path in files.items()} == contents(checkpoint)


def test_ilab_finds_every_file_after_a_push(
    checkpoint: Path, registry: Any, tmp_path: Path, tool: Callable[[str], str]
) -> None:
    layout, received = pack(checkpoint), tmp_path / "received"
    pushed = push(layout, f"{registry.host}/models/gemma:1", reporter=Console("quiet"))
    # `ilab model download` runs this copy itself, with this option.
    place = f"docker://{registry.host}/models/gemma:1"
    subprocess.run(
        [tool("skopeo"), "copy", "--quiet", "--src-tls-verify=false", place, f"oci:{received}", "--remove-signatures"],
        check=True,
        timeout=60,
    )
    assert root(received)[0]["digest"] == root(layout)[0]["digest"] == pushed.digest
    assert {name: path.read_bytes() for name, path in ilab_files(received).items()} == contents(checkpoint)


def test_oras_pulls_every_file_under_its_name(
    checkpoint: Path, registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no logins of whoever runs this
    from oras.client import OrasClient

    reference = f"{registry.host}/models/gemma:1"
    push(pack(checkpoint), reference, reporter=Console("quiet"))
    OrasClient(insecure=True).pull(target=reference, outdir=str(tmp_path / "pulled"))
    assert contents(tmp_path / "pulled") == contents(checkpoint)


def test_two_files_of_the_same_bytes_come_with_a_warning(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "tokenizer_config.json").write_text("{}")
    files = ilab_files(pack(checkpoint, Console()))
    assert "tokenizer_config.json and generation_config.json have the same bytes" in capsys.readouterr().err
    assert "tokenizer_config.json" not in files


def test_subdirectories_stay_in_the_names(raw_checkpoint: Callable[..., Path]) -> None:
    _, manifest = root(pack(raw_checkpoint(files={"sub/deep/config.json": '{"other": 1}'})))
    titles = [layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]]
    assert {"config.json", "sub/deep/config.json"} <= set(titles)


def test_the_same_artifact_again_is_recognized(checkpoint: Path) -> None:
    first = package(checkpoint, checkpoint.parent / "x", kind="artifact", reporter=Console("quiet"))
    second = package(checkpoint, checkpoint.parent / "x", kind="artifact", reporter=Console("quiet"))
    assert (first.already_there, second.already_there) == (False, True)
    assert first.digest == second.digest == Layout.open(first.layout).root.digest
    with pytest.raises(InvalidUsageError, match="holds another image"):
        package(checkpoint, checkpoint.parent / "x", reporter=Console("quiet"))


def test_it_can_be_read_from_any_offset_without_a_layout(checkpoint: Path) -> None:
    plan = plan_artifact(Checkpoint.open(checkpoint))
    assert plan.size_bytes == sum(map(len, contents(checkpoint).values()))
    for layer in plan.layers:
        data = (checkpoint / layer.title).read_bytes()
        assert b"".join(layer.iter_chunks()) == data
        assert b"".join(layer.iter_chunks(len(data) // 2)) == data[len(data) // 2 :]


def test_what_an_artifact_cannot_have_is_refused(checkpoint: Path) -> None:
    for base in (BaseChoice("none"), BaseChoice(platforms=(Platform("linux", "amd64"),))):
        with pytest.raises(InvalidUsageError, match="no base and no platform"):
            package(checkpoint, checkpoint.parent / "x", kind="artifact", base=base, reporter=Console("quiet"))
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        pack(checkpoint)
