"""What the tests of images share: the published schemas, a reader of layers that is not ours, layouts to build on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.oci.layout import create_layout
from gemma_pack.oci.manifest import (
    CONFIG_TYPE,
    LAYER_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    Index,
    Manifest,
    Platform,
    describe,
    encode_json,
    sha256_digest,
)
from tests.oci.layouts import blob_path, manifest_for
from tests.published import published

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


@pytest.fixture
def valid_oci() -> Callable[[str, Any], None]:
    """Return a function that checks a document against a JSON schema of the OCI image-spec, given its short name."""
    import jsonschema
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT4

    def retrieve(uri: str) -> Resource[Any]:
        name = f"oci-{uri.rsplit('/', 1)[-1]}"
        return Resource(contents=json.loads(published(name).read_text()), specification=DRAFT4)

    registry: Registry[Any] = Registry(retrieve=retrieve)  # type: ignore[call-arg]

    def check(kind: str, document: Any) -> None:
        schema = json.loads(published(f"oci-{kind}-schema.json").read_text())
        jsonschema.Draft4Validator(schema, registry=registry).validate(document)

    return check


@pytest.fixture
def valid_model_pack() -> Callable[[Any], None]:
    """Return a function that checks a model's configuration against the JSON schema of the CNCF model-spec."""
    import jsonschema

    schema = json.loads(published("modelpack-config-schema.json").read_text())
    return jsonschema.Draft202012Validator(schema).validate


@dataclass(frozen=True)
class Member:
    """One path of an unpacked image."""

    kind: bytes
    mode: int
    owner: tuple[int, int]
    sha256: str


@pytest.fixture
def unpack() -> Callable[[Path, str], dict[str, Member]]:
    """Return a function that lays the layers of a layout's image over one another, as a container runtime does.

    It is given the layout and an architecture and reads the JSON and the tars itself, with nothing of ours.
    """

    def read(directory: Path, architecture: str = "amd64") -> dict[str, Member]:
        members: dict[str, Member] = {}
        for layer in manifest_for(directory, architecture)["layers"]:
            with tarfile.open(blob_path(directory, layer["digest"])) as tar:
                for info in tar:
                    stream = tar.extractfile(info) if info.isreg() else None
                    content = hashlib.sha256(stream.read() if stream else b"").hexdigest()
                    members[info.name] = Member(info.type, info.mode & 0o7777, (info.uid, info.gid), content)
        return members

    return read


@dataclass(frozen=True)
class ContainerStorage:
    """Where podman and buildah keep images during a test: `options` for them, `prefix` for skopeo."""

    options: tuple[str, ...]
    prefix: str


@pytest.fixture
def container_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[ContainerStorage]:
    """Yield storage of its own for podman, buildah and skopeo, under a short path: podman takes 50 characters."""
    if os.geteuid() != 0:
        pytest.skip("the storage of containers needs root")
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)  # buildah wants the file to exist
    with tempfile.TemporaryDirectory(prefix="store-") as place:
        options = ("--root", f"{place}/root", "--runroot", f"{place}/run", "--storage-driver", "vfs")
        yield ContainerStorage(options, f"containers-storage:[vfs@{place}/root+{place}/run]")


@pytest.fixture
def write_base(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a small image as an OCI layout, one manifest a platform."""

    def write(
        name: str = "base",
        *,
        platforms: tuple[str, ...] = ("linux/amd64",),
        tar: bytes = b"",
        media_type: str = LAYER_TYPE,
        config: Mapping[str, Any] | None = None,
        layers: int = 1,
    ) -> Path:
        if not tar:
            empty = io.BytesIO()
            with tarfile.open(fileobj=empty, mode="w"):
                pass
            tar = empty.getvalue()
        with create_layout(tmp_path / name) as writer:
            manifests: list[Descriptor] = []
            writer.write_document(tar)
            for text in platforms:
                platform = Platform.parse(text)
                contents = {
                    **platform.to_json(),
                    "config": {"Env": ["PATH=/usr/bin"], "Labels": {"name": "the base", "version": "9.8"}},
                    "rootfs": {"type": "layers", "diff_ids": [sha256_digest(tar)] * layers},
                    **(config or {}),
                }
                encoded = encode_json(contents)
                writer.write_document(encoded)
                manifest = Manifest(
                    config=describe(encoded, CONFIG_TYPE), layers=(describe(tar, media_type),) * layers
                ).encode()
                writer.write_document(manifest)
                manifests.append(describe(manifest, MANIFEST_TYPE, platform=platform))
            index = Index(manifests=tuple(manifests))
            writer.write_document(index.encode())
            writer.add_image(describe(index.encode(), index.media_type))
        return tmp_path / name

    return write


@pytest.fixture
def certificate(tool: Callable[[str], str], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a directory with a certificate of its own for 127.0.0.1, and its key."""

    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        subprocess.run(
            [
                tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
                "-keyout", "key.pem", "-out", "cert.pem",
            ],
            cwd=tmp_path / name, check=True, capture_output=True,
        )  # fmt: skip
        return tmp_path / name

    return make
