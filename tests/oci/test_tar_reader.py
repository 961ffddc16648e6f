from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.errors import RegistryError
from gemma_pack.oci.tar_reader import MAX_EXTENDED_BYTES, Member, TarReader, place

Entry = tuple[str, bytes | None]
"""A name and the content of a file; None for a directory."""

_names = st.lists(st.text("abcé-_.", min_size=1, max_size=70), min_size=1, max_size=4).map("/".join)
_entries = st.lists(st.tuples(_names, st.none() | st.binary(max_size=1500)), max_size=6)


def write(entries: list[Entry], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return stream.getvalue()


def read(data: bytes, piece_bytes: int = 1 << 30) -> list[tuple[Member, bytes]]:
    reader = TarReader("the layer")
    members: list[tuple[Member, bytearray]] = []
    position = 0
    while position < len(data):
        size = min(reader.left, piece_bytes, len(data) - position)
        run = data[position : position + size]
        if reader.in_content:
            members[-1][1].extend(run)
        member = reader.feed(run)
        if member:
            members.append((member, bytearray()))
        position += size
        assert reader.offset == position
    assert reader.may_end
    return [(member, bytes(content)) for member, content in members]


@given(_entries, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.integers(1, 3000))
def test_it_reads_what_the_standard_library_writes_in_pieces_of_any_size(
    entries: list[Entry], tar_format: int, piece_bytes: int
):
    data = write(entries, tar_format)
    found = [
        (member.name, None if member.kind == "directory" else content) for member, content in read(data, piece_bytes)
    ]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        streams = [(info.name, tar.extractfile(info)) for info in tar]
        expected = [(name, stream.read() if stream else None) for name, stream in streams]
    assert found == expected


def test_a_ustar_name_is_put_together_from_its_prefix():
    name = "models/" + "d" * 90 + "/" + "f" * 90
    assert read(write([(name, b"x")], tarfile.USTAR_FORMAT))[0][0].name == name


def test_a_size_over_8_gib_is_read_from_a_header():
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("models/big")
        info.size = 9 << 30
        header = info.tobuf(tar_format)
        reader = TarReader("the layer")
        member = None
        for first in range(0, len(header), 512):
            view = memoryview(header)[first : first + 512]
            while view:
                run = view[: reader.left]
                member = reader.feed(run) or member
                view = view[len(run) :]
        assert member
        assert (member.size_bytes, reader.left, reader.in_content) == (9 << 30, 9 << 30, True)


def test_content_can_be_skipped():
    data = write([("models/a", b"x" * 1000), ("models/b", b"y")])
    reader = TarReader("the layer")
    assert reader.feed(data[:512])
    reader.feed(data[512:600])
    reader.skip()
    assert reader.offset == 512 + 1024
    member = reader.feed(data[1536:2048])
    assert member
    assert member.name == "models/b"


def test_a_link_has_no_content_whatever_its_size_says():
    info = tarfile.TarInfo("models/link")
    info.type, info.linkname, info.size = tarfile.SYMTYPE, "elsewhere", 700
    reader = TarReader("the layer")
    member = reader.feed(info.tobuf())
    assert member
    assert (member.kind, member.size_bytes, reader.in_content) == ("other", 0, False)


def test_it_may_end_with_or_without_an_end_mark_but_not_within_a_member():
    data = write([("models/a", b"x" * 1000)])
    reader = TarReader("the layer")
    ends = []
    position = 0
    while position < len(data):
        run = data[position : position + reader.left]
        reader.feed(run)
        position += len(run)
        if reader.may_end and not reader.ended:
            ends.append(position)
    assert ends == [512 + 1024]
    assert reader.ended


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(records)
    return info.tobuf() + records.ljust(-(-len(records) // 512) * 512, b"\0")


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def header(name: str = "models/a", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf()


def negative_size() -> bytes:
    block = bytearray(header())
    block[124:136] = b"\xff" * 12
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "data",
    [
        b"not a tar at all".ljust(512, b"!"),
        header()[:148] + b"0000000\0" + header()[156:],
        pax(b"nonsense") + header(),
        pax(b"99 path=x\n") + header(),
        pax(b"0 path=x\n") + header(),
        pax(b"-9 path=x") + header(),
        pax(record("size", "-1")) + header(),
        pax(record("size", "1e3")) + header(),
        pax(record("size", "9" * 30)) + header(),
        pax(record("GNU.sparse.major", "1")) + header(),
        pax(record("path", "models/x"), tarfile.XGLTYPE) + header(),
        header(type=tarfile.GNUTYPE_SPARSE),
        header(type=tarfile.GNUTYPE_LONGNAME, size=0),
        header(type=tarfile.GNUTYPE_LONGNAME, size=MAX_EXTENDED_BYTES + 1),
        header(type=tarfile.XHDTYPE, size=5 << 30),
        negative_size(),
    ],
)
def test_a_broken_header_is_an_error_that_names_the_layer(data: bytes):
    with pytest.raises(RegistryError, match=r"^the layer"):
        read(data)


def test_a_comment_for_all_members_is_passed_over():
    data = pax(record("comment", "0123abc"), tarfile.XGLTYPE) + write([("models/a", b"x")])
    assert [member.name for member, _ in read(data)] == ["models/a"]


@given(st.binary(max_size=3000), st.integers(1, 600))
def test_any_bytes_are_read_or_refused(data: bytes, piece_bytes: int):
    reader = TarReader("the layer")
    try:
        while data:
            run = data[: min(reader.left, piece_bytes)]
            reader.feed(run)
            data = data[len(run) :]
    except RegistryError:
        pass


@given(st.data())
def test_a_tar_with_any_damage_is_read_or_refused(data: st.DataObject):
    tar = bytearray(write([("models/a", b"x" * 600), ("models/" + "é" * 90, b"y")], tarfile.PAX_FORMAT))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(tar) - 1))
        tar[position] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, 3)) * 512
    block = tar[start : start + 512]
    block[148:156] = b" " * 8
    tar[start + 148 : start + 156] = b"%06o\0 " % sum(block)  # so that damage gets past the checksum
    reader = TarReader("the layer")
    view = memoryview(tar)
    try:
        while view:
            run = view[: reader.left]
            member = reader.feed(run)
            view = view[len(run) :]
            if member:
                place(member.name, "the layer")
    except RegistryError:
        pass


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("models", "."),
        ("models/", "."),
        ("./models/config.json", "config.json"),
        ("models/sub/./x", "sub/x"),
        ("models//x", "x"),
        ("models/...", "..."),
        ("models/-rf", "-rf"),
    ],
)
def test_what_lies_in_models_has_a_place(name: str, path: str):
    assert str(place(name, "the layer")) == path


@pytest.mark.parametrize("name", ["", ".", "etc/passwd", "modelsx/a", "usr/models/a", "etc/.wh.passwd", ".wh.etc"])
def test_what_lies_elsewhere_has_none(name: str):
    assert place(name, "the layer") is None


@pytest.mark.parametrize(
    "name",
    [
        "/models/a",
        "/etc/passwd",
        "../etc/passwd",
        "models/../etc/passwd",
        "models/a/..",
        "models/.wh.config.json",
        "models/sub/.wh..wh..opq",
        ".wh.models",
        "./.wh.models",
        ".wh..wh..opq",
        "models/a\nb",
        "models/\x1b[2J",
        "models/\udcff",
        "models/" + "x" * 256,
        "models/" + "é" * 128,
        "models/" + "x/" * 600 + "y",
        "models/" + "x/" * 32 + "y",
    ],
)
def test_names_that_lead_elsewhere_or_delete_are_refused(name: str):
    with pytest.raises(RegistryError, match=r"^the layer") as caught:
        place(name, "the layer")
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()


@given(st.text(max_size=40) | st.text("models/.wh\0", max_size=30))
def test_no_place_leaves_the_directory(name: str):
    try:
        path = place(name, "the layer")
    except RegistryError:
        return
    if path is not None:
        assert not path.is_absolute()
        assert ".." not in path.parts
