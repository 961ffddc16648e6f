from __future__ import annotations

import gzip
import io
import random
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_pack.errors import RegistryError
from gemma_pack.oci import extraction as extraction_module
from gemma_pack.oci.extraction import Gunzip, LayerExtraction, require_known
from gemma_pack.oci.manifest import GZIP_LAYER_TYPE, LAYER_TYPE, Descriptor, describe

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

WEIGHTS = random.Random(1).randbytes(300_000)  # noqa: S311 - test data
FILES = {
    "models/config.json": b"{}",
    "models/weights": WEIGHTS,
    "models/sub/empty": b"",
    "etc/base": b"of the base image" * 100,
    "models/last": b"z" * 512,
}


def tar(files: dict[str, bytes] | None = None, *others: tarfile.TarInfo, tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as archive:
        for info in others:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
        for name, content in (FILES if files is None else files).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def special(name: str, kind: bytes, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


PLAIN = tar()
GZIPPED = gzip.compress(PLAIN[:100_000], mtime=0) + gzip.compress(PLAIN[100_000:], mtime=0)


def plain(data: bytes = PLAIN) -> tuple[bytes, Descriptor]:
    return data, describe(data, LAYER_TYPE)


def gzipped(data: bytes = GZIPPED) -> tuple[bytes, Descriptor]:
    return data, describe(data, GZIP_LAYER_TYPE)


def pieces(data: bytes, size: int = 65536) -> Iterable[bytes]:
    return (data[first : first + size] for first in range(0, len(data), size))


def extract(parent: Path, data: bytes, layer: Descriptor, size: int = 65536) -> dict[str, bytes]:
    with LayerExtraction(parent, layer, "the layer") as extraction:
        start = extraction.restore()
        for piece in pieces(data[start:], size):
            extraction.write(piece)
        assert extraction.finish()
    return unpacked(extraction.done)


def unpacked(done: Path) -> dict[str, bytes]:
    assert [path.name for path in done.iterdir()] == ["files"]
    root = done / "files"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


EXPECTED = {"config.json": b"{}", "weights": WEIGHTS, "sub/empty": b"", "last": b"z" * 512}
"""What comes out: below /models, and nothing of the base."""


@pytest.mark.parametrize("layer", [plain(), gzipped()], ids=["plain", "gzip"])
@pytest.mark.parametrize("size", [1, 513, 65536, 1 << 20])
def test_the_files_under_models_come_out(tmp_path: Path, layer: tuple[bytes, Descriptor], size: int):
    if size == 1:
        layer = (
            plain(tar({"models/a": b"x" * 700}))
            if layer == plain()
            else gzipped(gzip.compress(tar({"models/a": b"x" * 700})))
        )
        assert extract(tmp_path, *layer, size=1) == {"a": b"x" * 700}
    else:
        assert extract(tmp_path, *layer, size=size) == EXPECTED


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_any_common_tar_format_is_read(tmp_path: Path, tar_format: int):
    name = "models/" + "d" * 80 + "/" + "f" * 80
    assert extract(tmp_path, *plain(tar({name: b"x"}, tar_format=tar_format))) == {name.removeprefix("models/"): b"x"}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, len(PLAIN) - 1), min_size=1, max_size=4), st.booleans(), st.data())
def test_it_goes_on_from_wherever_a_killed_process_left_it(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], gz: bool, data: st.DataObject
):
    parent = tmp_path_factory.mktemp("layers")
    content, layer = gzipped() if gz else plain()
    for stop in sorted(stops):
        abandoned = LayerExtraction(parent, layer, "the layer")
        start = abandoned.restore()
        for piece in pieces(content[start : max(start, min(stop, len(content) - 1))], 40_000):
            abandoned.write(piece)
        abandoned._close()  # as a killed process does, with nothing said
    if data.draw(st.booleans(), label="the disk lost the end of a file"):
        written = [path for path in parent.rglob("*") if path.is_file() and path.stat().st_size]
        if written:
            victim = data.draw(st.sampled_from(sorted(written)))
            with victim.open("r+b") as stream:
                stream.truncate(data.draw(st.integers(0, victim.stat().st_size)))
    assert extract(parent, content, layer) == EXPECTED


def test_what_is_read_back_is_not_asked_for_again(tmp_path: Path):
    for content, layer in (plain(), gzipped()):
        first = LayerExtraction(tmp_path, layer, "the layer")
        for piece in pieces(content[:200_000], 10_000):
            first.write(piece)
        first._close()
        with LayerExtraction(tmp_path, layer, "the layer") as second:
            assert second.restore() == 200_000


def test_plain_weights_are_on_the_disk_once(tmp_path: Path):
    content, layer = plain()
    with LayerExtraction(tmp_path, layer, "the layer") as extraction:
        extraction.restore()
        for piece in pieces(content):
            extraction.write(piece)
        size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert size == len(content)


def test_damage_that_came_back_from_disk_is_found_by_the_digest(tmp_path: Path):
    content, layer = plain()
    first = LayerExtraction(tmp_path, layer, "the layer")
    first.write(content[:200_000])
    first._close()
    weights = next(tmp_path.rglob("weights"))
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    with LayerExtraction(tmp_path, layer, "the layer") as second:
        start = second.restore()
        second.write(content[start:])
        assert not second.finish()
        assert list(tmp_path.iterdir()) == []
        second.write(content)
        assert second.finish()
        assert unpacked(second.done) == EXPECTED


def test_a_journal_that_is_no_tar_is_discarded(tmp_path: Path):
    content, layer = plain()
    (tmp_path / f"{layer.hex}.partial" / "files").mkdir(parents=True)
    (tmp_path / f"{layer.hex}.partial" / "journal").write_bytes(b"!" * 1000)
    assert extract(tmp_path, content, layer) == EXPECTED


def test_a_longer_file_of_an_earlier_try_leaves_no_end_behind(tmp_path: Path):
    content, layer = plain()
    files = tmp_path / f"{layer.hex}.partial" / "files"
    files.mkdir(parents=True)
    (files / "weights").write_bytes(bytes(len(WEIGHTS) + 5000))
    (tmp_path / f"{layer.hex}.partial" / "journal").write_bytes(b"")
    assert extract(tmp_path, content, layer) == EXPECTED


def test_other_bytes_than_those_of_the_digest_leave_nothing(tmp_path: Path):
    content, layer = plain()
    wrong = bytearray(content)
    wrong[-700_0 % len(wrong)] ^= 1
    with LayerExtraction(tmp_path, layer, "the layer") as extraction:
        extraction.write(bytes(wrong))
        assert not extraction.finish()
    assert list(tmp_path.iterdir()) == []


def test_more_bytes_than_the_image_says_are_refused(tmp_path: Path):
    content, layer = plain()
    with LayerExtraction(tmp_path, layer, "the layer") as extraction:
        extraction.write(content)
        with pytest.raises(RegistryError, match="more than"):
            extraction.write(b"x")


def test_a_layer_of_no_bytes_is_a_layer(tmp_path: Path):
    assert extract(tmp_path, *plain(b"")) == {}


BAD = {
    "symbolic link": tar({}, special("models/a", tarfile.SYMTYPE, linkname="/etc/passwd")),
    "hard link": tar({}, special("models/a", tarfile.LNKTYPE, linkname="etc/passwd")),
    "device": tar({}, special("models/a", tarfile.CHRTYPE)),
    "block device": tar({}, special("models/a", tarfile.BLKTYPE)),
    "fifo": tar({}, special("models/a", tarfile.FIFOTYPE)),
    "unknown type": tar({}, special("models/a", b"Q")),
    "models as a link": tar({}, special("models", tarfile.SYMTYPE, linkname="/etc")),
    "models as a file": tar({"models": b"x"}),
    "absolute": tar({"/models/a": b"x"}),
    "upwards": tar({"models/../../etc/passwd": b"x"}),
    "upwards outside models": tar({"../x": b"x"}),
    "whiteout": tar({"models/.wh.config.json": b""}),
    "twice": tar({"models/a": b"x", "models//a": b"y"}),
    "file then directory": tar({"models/a": b"x", "models/a/b": b"y"}),
    "directory then file": tar({"models/a/b": b"x", "models/a": b"y"}),
    "control characters": tar({"models/a\x1b[31m": b"x"}),
    "long name": tar({"models/" + "x" * 300: b"x"}),
    "cut in a file": PLAIN[:150_000],
    "cut in a header": PLAIN[:700],
    "no tar": b"<html>" * 1000,
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_what_must_not_be_unpacked_is_refused_and_stays_inside(tmp_path: Path, what: str, gz: bool):
    inside = tmp_path / "inside"
    inside.mkdir()
    content, layer = gzipped(gzip.compress(BAD[what])) if gz else plain(BAD[what])
    with LayerExtraction(inside, layer, "the layer") as extraction, pytest.raises(RegistryError, match=r"^the layer"):
        extract(inside, content, layer)
    extraction.discard()
    assert [path for path in tmp_path.rglob("*") if path != inside] == []


def test_links_elsewhere_in_a_base_image_are_passed_over(tmp_path: Path):
    links = [
        special("bin", tarfile.SYMTYPE, linkname="usr/bin"),
        special("usr/bin/sh", tarfile.LNKTYPE, linkname="usr/bin/bash"),
        special("dev/null", tarfile.CHRTYPE),
    ]
    assert extract(tmp_path, *plain(tar({"models/a": b"x"}, *links))) == {"a": b"x"}


def test_a_file_larger_than_its_layer_is_refused_before_it_is_written(tmp_path: Path):
    info = special("models/a", tarfile.REGTYPE, size=1 << 40)
    content, layer = plain(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    with LayerExtraction(tmp_path, layer, "the layer") as extraction, pytest.raises(RegistryError, match="promises"):
        extraction.write(content)


def test_a_gzip_bomb_is_stopped(tmp_path: Path):
    bomb = gzip.compress(tar({"models/a": bytes(200 << 20)}))
    content, layer = gzipped(bomb)
    with (
        LayerExtraction(tmp_path, layer, "the layer") as extraction,
        pytest.raises(RegistryError, match=r"promises|fold"),
    ):
        extraction.write(content)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 30 << 20


def test_a_bomb_of_nothing_but_zeros_is_stopped():
    gunzip = Gunzip(1000, "the layer")
    bomb = gzip.compress(bytes(300 << 20))
    with pytest.raises(RegistryError, match="100-fold"):
        for _ in gunzip.feed(bomb):
            pass


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extraction_module, "MAX_FILES", 10)
    with pytest.raises(RegistryError, match="more than 10 files"):
        extract(tmp_path, *plain(tar({f"models/{number}": b"" for number in range(11)})))


@given(st.binary(max_size=5000), st.integers(1, 700))
def test_gunzip_gives_back_what_was_compressed(data: bytes, size: int):
    stream = gzip.compress(data) + gzip.compress(data[::-1]) + bytes(20)
    gunzip = Gunzip(len(stream) + len(data), "the layer")
    assert b"".join(out for piece in pieces(stream, size) for out in gunzip.feed(piece)) == data + data[::-1]
    assert gunzip.may_end


@pytest.mark.parametrize("cut", [1, 9, 500])
def test_a_gzip_stream_that_is_cut_is_no_whole_layer(tmp_path: Path, cut: int):
    stream = gzip.compress(PLAIN)[:-cut]
    with pytest.raises(RegistryError, match="ends in the middle"):
        extract(tmp_path, *gzipped(stream))


def test_zstd_and_other_types_are_refused_with_a_sentence():
    layer = describe(b"", LAYER_TYPE + "+zstd")
    with pytest.raises(RegistryError, match="compressed with zstd"):
        require_known(layer, "the layer")
    with pytest.raises(RegistryError, match="neither the tar of a container image"):
        require_known(describe(b"", "application/vnd.cncf.model.weight.v1.tar"), "the layer")
    raw = "application/vnd.cncf.model.weight.v1.raw"
    for known in (LAYER_TYPE, GZIP_LAYER_TYPE, "application/vnd.docker.image.rootfs.diff.tar.gzip", raw):
        require_known(describe(b"", known), "the layer")
