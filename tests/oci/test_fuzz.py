"""Images made to harm: whatever a manifest, an index or a tar says, an error of ours and nothing outside the target."""

from __future__ import annotations

import copy
import gzip
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_pack.console import Console
from gemma_pack.errors import GemmaPackError
from gemma_pack.oci.describe import describe
from gemma_pack.oci.layout import create_layout
from gemma_pack.oci.manifest import (
    CONFIG_TYPE,
    GZIP_LAYER_TYPE,
    INDEX_TYPE,
    LAYER_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    encode_json,
    sha256_digest,
)
from gemma_pack.oci.manifest import describe as describe_bytes
from gemma_pack.oci.pull import pull
from gemma_pack.oci.push import push

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUIET = Console("quiet")
FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

PARTS = st.sampled_from(
    ["models", "..", ".", "", "a", "config.json", "/", "tmp", ".wh.a", ".wh..wh..opq", "b\0c", "é", "x" * 120, "con\n"]
)
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join) | st.lists(PARTS, max_size=3).map(
    lambda parts: "/".join(["models", *parts])
)
KINDS = st.sampled_from([
    tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
    tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, b"Z",
])  # fmt: skip


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Draw the bytes of a tar whose members go where they should not, and sometimes are not what they say."""
    made = io.BytesIO()
    chosen = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]))
    with tarfile.open(fileobj=made, mode="w", format=chosen) as tar:
        for _ in range(draw(st.integers(1, 5))):
            info = tarfile.TarInfo(draw(NAMES))
            info.type = draw(KINDS)
            info.linkname = draw(st.sampled_from(["", "models/a", "/etc/passwd", "../../outside", "."]))
            info.mode = draw(st.sampled_from([0o644, 0o777, 0o4755, 0]))
            content = draw(st.binary(max_size=40)) if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else b""
            info.size = len(content)
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # a name that this format cannot hold
                continue
    data = bytearray(made.getvalue())
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    block = 512 * draw(st.integers(0, 4))
    if block + 512 <= len(data):  # so that damage gets past the checksum
        data[block + 148 : block + 156] = b" " * 8
        data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
    return bytes(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["sha256:" + "0" * 64, "sha512:" + "0" * 128, INDEX_TYPE, MANIFEST_TYPE, LAYER_TYPE, "../../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON document."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document if isinstance(document, list) else ())
    )
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def change(draw: st.DrawFn, document: Any) -> Any:
    """Replace or remove one value anywhere in a JSON document."""
    *above, last = draw(st.sampled_from([place for place in places(document) if place]))
    changed = copy.deepcopy(document)
    inner = changed
    for key in above:
        inner = inner[key]
    if draw(st.booleans()):
        inner[last] = draw(json_values)
    else:
        del inner[last]
    return changed


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, Any]:
    """Draw which document of an image is changed, and how: a function from the sound one."""
    which = draw(st.sampled_from(["manifest", "index", "config", "index.json"]))
    return which, lambda sound: change(draw, sound)


def write_layout(target: Path, layer: bytes, *, gz: bool = False, spoil: tuple[str, Any] = ("", None)) -> None:
    """Write an image of one layer, one of whose documents is `spoil`ed, all digests being right."""

    def encoded(name: str, document: Any) -> bytes:
        changed = spoil[1](document) if spoil[0] == name else document
        return json.dumps(changed).encode()

    blob = gzip.compress(layer, mtime=0) if gz else layer
    with create_layout(target) as writer:
        writer.write_document(blob)
        platform = {"os": "linux", "architecture": "amd64"}
        rootfs = {"type": "layers", "diff_ids": [sha256_digest(layer)]}
        config = encoded("config", {**platform, "config": {"Labels": {"name": "x"}}, "rootfs": rootfs})
        writer.write_document(config)
        described = describe_bytes(blob, GZIP_LAYER_TYPE if gz else LAYER_TYPE).to_json()
        manifest = encoded("manifest", {
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": describe_bytes(config, CONFIG_TYPE).to_json(),
            "layers": [described], "annotations": {"org.opencontainers.image.title": "x"},
        })  # fmt: skip
        writer.write_document(manifest)
        entry = {**describe_bytes(manifest, MANIFEST_TYPE).to_json(), "platform": platform}
        index = encoded("index", {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]})
        writer.write_document(index)
        writer.add_image(Descriptor(media_type=INDEX_TYPE, digest=sha256_digest(index), size_bytes=len(index)))
    if spoil[0] == "index.json":
        path = target / "index.json"
        path.write_bytes(encode_json(spoil[1](json.loads(path.read_bytes()))))


def snapshot(directory: Path) -> dict[str, bytes | str | None]:
    """Return all that lies in a directory, without following links."""
    return {
        str(path.relative_to(directory)): str(path.readlink()) if path.is_symlink() else
        path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }  # fmt: skip


@pytest.fixture
def room(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return a function that makes a fresh directory with something beside the target that must stay as it is."""

    def make() -> Path:
        directory = tmp_path_factory.mktemp("room")
        (directory / "outside").mkdir()
        (directory / "outside" / "precious").write_bytes(b"as it was")
        (directory / "inside").mkdir()
        return directory

    return make


def pull_and_look(room: Path) -> None:
    """Pull the layout in a room; nothing but our errors, and nothing but the target and its companions changes."""
    before = {name: value for name, value in snapshot(room).items() if not name.startswith("inside")}
    target = room / "inside" / "model"
    try:
        pull(room / "image.oci", target, reporter=QUIET)
    except GemmaPackError as error:
        assert error.message  # noqa: PT017 - either outcome is right
        assert not target.exists()
    after = {name: value for name, value in snapshot(room).items() if not name.startswith("inside")}
    assert after == before
    assert {path.name for path in (room / "inside").iterdir()} <= {"model", ".model.pull", ".model.pulled.json"}
    for path in (room / "inside").rglob("*"):
        assert path.is_dir() or path.is_file()
        assert not path.is_symlink()


@FUZZ
@given(layer=tars(), gz=st.booleans())
def test_no_tar_leads_out_of_the_target(room: Callable[[], Path], layer: bytes, gz: bool):
    place = room()
    write_layout(place / "image.oci", layer, gz=gz)
    pull_and_look(place)


@FUZZ
@given(data=st.data())
def test_no_document_is_a_traceback(room: Callable[[], Path], data: st.DataObject):
    place = room()
    spoil = data.draw(documents())
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        info = tarfile.TarInfo("models/config.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    write_layout(place / "image.oci", layer.getvalue(), spoil=spoil)
    try:
        describe(place / "image.oci")
    except GemmaPackError as error:
        assert error.message  # noqa: PT017 - either outcome is right
    pull_and_look(place)
    with pytest.raises(GemmaPackError):  # nobody listens there; a broken layout is found before that
        push(place / "image.oci", "127.0.0.1:1/a/b:1", reporter=QUIET)
