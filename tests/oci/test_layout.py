"""Layouts: read with suspicion, written whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gemma_pack.errors import InvalidUsageError, RegistryError
from gemma_pack.oci.layout import Layout, create_layout, hash_stream
from gemma_pack.oci.manifest import INDEX_TYPE, MANIFEST_TYPE, Descriptor, Index, Manifest, describe, sha256_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BROKEN = {
    "no marker": lambda d: (d / "oci-layout").unlink(),
    "no index": lambda d: (d / "index.json").unlink(),
    "another version": lambda d: (d / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}'),
    "a marker that is no JSON": lambda d: (d / "oci-layout").write_text("1.0.0"),
    "an index that is no JSON": lambda d: (d / "index.json").write_bytes(b"\xff"),
    "an index that is a manifest": lambda d: (d / "index.json").write_bytes(
        Manifest(config=describe(b"", "x"), layers=()).encode()
    ),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=list(BROKEN))
def test_what_is_no_layout_is_refused(write_base: Callable[..., Path], spoil: Callable[[Path], object]) -> None:
    directory = write_base()
    spoil(directory)
    with pytest.raises(RegistryError):
        Layout.open(directory)


def test_a_directory_that_does_not_exist_is_no_layout(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no OCI image layout") as caught:
        Layout.open(tmp_path / "nothing")
    assert caught.value.hint


def test_an_index_and_its_manifests_are_resolved(write_base: Callable[..., Path]) -> None:
    layout = Layout.open(write_base(platforms=("linux/amd64", "linux/arm64")))
    assert layout.root.media_type == INDEX_TYPE
    assert [str(descriptor.platform) for descriptor, _ in layout.manifests()] == ["linux/amd64", "linux/arm64"]
    (first, manifest), _ = layout.manifests()
    assert layout.manifests(first) == [(first, manifest)]


def test_a_layout_of_several_images_has_no_root(tmp_path: Path) -> None:
    manifest = Manifest(config=describe(b"{}", "x"), layers=()).encode()
    with create_layout(tmp_path / "two") as writer:
        writer.write_document(manifest)
        for name in ("one", "two"):
            writer.add_image(describe(manifest, MANIFEST_TYPE, annotations={"org.opencontainers.image.ref.name": name}))
    layout = Layout.open(tmp_path / "two")
    with pytest.raises(RegistryError, match="holds 2 images where one is wanted"):
        _ = layout.root
    assert len(layout.manifests(layout.index.manifests[0])) == 1


def test_a_root_of_another_kind_is_refused(tmp_path: Path) -> None:
    with create_layout(tmp_path / "odd") as writer:
        writer.add_image(Descriptor(media_type="text/plain", digest=sha256_digest(b""), size_bytes=0))
    with pytest.raises(RegistryError, match="text/plain, neither"):
        Layout.open(tmp_path / "odd").manifests()


def test_an_index_inside_an_index_is_refused(tmp_path: Path) -> None:
    inner = Index(manifests=()).encode()
    outer = Index(manifests=(describe(inner, INDEX_TYPE),)).encode()
    with create_layout(tmp_path / "deep") as writer:
        writer.write_document(inner)
        writer.write_document(outer)
        writer.add_image(describe(outer, INDEX_TYPE))
    with pytest.raises(RegistryError, match="not an image manifest"):
        Layout.open(tmp_path / "deep").manifests()


def test_damage_to_a_document_is_noticed(write_base: Callable[..., Path]) -> None:
    layout = Layout.open(write_base())
    path = layout.blob_path(layout.root.digest)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(RegistryError, match="damaged"):
        layout.manifests()
    path.write_bytes(data[:-1])
    with pytest.raises(RegistryError, match="its descriptor says"):
        layout.manifests()
    path.unlink()
    with pytest.raises(RegistryError, match="lacks the blob"):
        layout.manifests()


def test_a_document_of_the_size_of_weights_is_not_read_into_memory(write_base: Callable[..., Path]) -> None:
    layout = Layout.open(write_base())
    huge = Descriptor(media_type="x", digest=sha256_digest(b""), size_bytes=20 << 30)
    with pytest.raises(RegistryError, match="4 MiB"):
        layout.read_blob(huge)


def test_blobs_lie_under_their_digests(tmp_path: Path) -> None:
    seen: list[int] = []
    with create_layout(tmp_path / "out") as writer:
        small = writer.write_document(b"small")
        large = writer.write_stream(iter([b"la", b"", b"rge"]), seen.append)
    assert (small, large) == (sha256_digest(b"small"), sha256_digest(b"large"))
    assert hash_stream(iter([b"la", b"rge"])) == large
    assert seen == [2, 0, 3]
    layout = Layout.open(tmp_path / "out")
    assert layout.read_blob(describe(b"large", "x")) == b"large"
    assert sorted(path.relative_to(layout.directory).as_posix() for path in layout.directory.rglob("*")) == sorted(
        [
            "blobs",
            "blobs/sha256",
            f"blobs/sha256/{small.removeprefix('sha256:')}",
            f"blobs/sha256/{large.removeprefix('sha256:')}",
            "index.json",
            "oci-layout",
        ]
    )
    assert {path.stat().st_mode & 0o777 for path in layout.directory.rglob("*") if path.is_file()} == {0o644}


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"), create_layout(tmp_path / "out") as writer:
        writer.write_stream(broken())
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InvalidUsageError, match="in the way"), create_layout(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
