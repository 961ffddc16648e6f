"""The safetensors format: what is damaged is refused, what passes the library reads, what we write it reads too."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.errors import CheckpointError
from gemma_pack.safetensors_file import DTYPE_BITS, MAX_HEADER_BYTES, read_header, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def container(header: Any, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header, given as JSON bytes or as what JSON can write."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_a_header_says_where_each_tensor_lies(file: Path):
    file.write_bytes(
        container({"b": entry(4, 6), "a": entry(0, 4, [2], "BF16"), "__metadata__": {"format": "pt"}}, b"123456")
    )
    first, second = read_header(file)
    assert (first.name, first.dtype, first.shape, first.size_bytes, first.parameters) == ("a", "BF16", (2,), 4, 2)
    assert (first.read(), second.read()) == (b"1234", b"56")
    assert second.digest() == hashlib.sha256(b"56").hexdigest()


def test_empty_tensors_and_scalars_have_their_place(file: Path):
    file.write_bytes(container({"b": entry(0, 1, []), "empty": entry(0, 0, [3, 0]), "end": entry(1, 1)}, b"1"))
    assert [info.name for info in read_header(file)] == ["empty", "b", "end"]


DAMAGED = {
    "empty": (b"", "truncated or no safetensors"),
    "seven bytes": (b"1234567", "truncated or no safetensors"),
    "a header longer than the file": ((100).to_bytes(8, "little") + b"{}", "truncated or no safetensors"),
    "a header longer than the format allows": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "truncated or no safetensors"
    ),
    "no JSON": (container(b"{'a': 1}"), "corrupt safetensors header"),
    "no UTF-8": (container(b'{"\xff": 1}'), "corrupt safetensors header"),
    "UTF-16": (container("{}".encode("utf-16-le")), "corrupt safetensors header"),
    "a list": (container([]), "corrupt safetensors header"),
    "nested without end": (container(b"[" * 100_000), "corrupt safetensors header"),
    "a number of many digits": (container(b'{"a": ' + b"9" * 5000 + b"}"), "corrupt safetensors header"),
    "not a number": (container(b'{"a": NaN}'), "corrupt safetensors header"),
    "the same name twice": (container(b'{"a": {}, "a": {}}'), "corrupt safetensors header"),
    "metadata that is no text": (container({"__metadata__": {"a": 1}}), "corrupt safetensors header"),
    "an entry that is no object": (container({"a": 1}), "corrupt entry for 'a'"),
    "an entry without a dtype": (container({"a": {"shape": [0], "data_offsets": [0, 0]}}), "corrupt entry for 'a'"),
    "a dtype that is no name": (container({"a": entry(0, 0, dtype=["U8"])}), "corrupt entry for 'a'"),  # type: ignore[arg-type]
    "a dtype of the future": (container({"a": entry(0, 1, dtype="U1")}, b"1"), "a has dtype U1, which is not known"),
    "three offsets": (container({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0, 0]}}), "corrupt entry"),
    "a negative offset": (container({"a": entry(-1, 0)}, b"1"), "corrupt entry"),
    "a dimension that is true": (container({"a": entry(0, 1, [True])}, b"1"), "corrupt entry"),
    "a fraction of a dimension": (container({"a": entry(0, 1, [1.0])}, b"1"), "corrupt entry"),  # type: ignore[list-item]
    "a shape that is text": (container({"a": entry(0, 1, "1")}, b"1"), "corrupt entry"),  # type: ignore[arg-type]
    "a shape beyond 64 bits": (container({"a": entry(0, 0, [2**64, 0])}), "corrupt entry"),
    "half a character in a name": (container({"\ud800": entry(0, 0)}), "corrupt entry"),
    "offsets at odds with the shape": (container({"a": entry(0, 3, [2])}, b"123"), "dtype and offsets of a disagree"),
    "offsets that run backwards": (container({"a": entry(2, 0, [0])}, b"12"), "dtype and offsets of a disagree"),
    "half a byte": (container({"a": entry(0, 1, [3], "F4")}, b"1"), "dtype and offsets of a disagree"),
    "a gap": (container({"a": entry(0, 1), "b": entry(2, 3)}, b"123"), "a gap or an overlap before b"),
    "a gap at the start": (container({"a": entry(1, 2)}, b"12"), "a gap or an overlap before a"),
    "an overlap": (container({"a": entry(0, 2), "b": entry(1, 3)}, b"123"), "a gap or an overlap before b"),
    "a tensor cut short": (container({"a": entry(0, 4)}, b"123"), "is truncated"),
    "bytes after the last tensor": (container({"a": entry(0, 4)}, b"12345"), "has bytes after its last tensor"),
    "bytes and no tensor": (container({}, b"1"), "has bytes after its last tensor"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_named(file: Path, content: bytes, reason: str):
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(file)
    assert str(file) in caught.value.message
    assert caught.value.hint


def test_a_missing_file_is_named(file: Path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        read_header(file)


def test_a_file_that_shrinks_after_its_header_was_read_gives_neither_bytes_nor_digest(file: Path):
    file.write_bytes(container({"a": entry(0, 4)}, b"1234"))
    (info,) = read_header(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ended in the middle of a"):
        info.read()
    with pytest.raises(CheckpointError, match="ended in the middle of a"):
        info.digest()


def test_the_element_sizes_are_the_library_s_own():
    for dtype, bits in DTYPE_BITS.items():
        content = container({"a": entry(0, bits, [8], dtype)}, bytes(bits))
        assert safetensors.deserialize(content)[0][0] == "a"
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(container({"a": entry(0, bits + 1, [8], dtype)}, bytes(bits + 1)))


_numbers = st.one_of(st.integers(-1, 20), st.integers(), st.floats(), st.booleans(), st.none())
_entries = st.one_of(
    _numbers,
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(st.sampled_from([*DTYPE_BITS, "I4"]), st.text(max_size=3), _numbers),
            "shape": st.one_of(st.lists(st.integers(0, 4), max_size=3), st.lists(_numbers, max_size=3), st.text()),
            "data_offsets": st.one_of(st.lists(_numbers, min_size=1, max_size=3), st.text(max_size=2)),
            "other": _numbers,
        },
    ),
)
_headers = st.one_of(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "\ud800"]), _entries, max_size=3),
    st.lists(_numbers, max_size=2),
    _numbers,
)


def check(content: bytes, directory: Path) -> None:
    """Assert that a file is refused with CheckpointError, or that the library agrees about what is in it."""
    file = directory / "fuzzed.safetensors"
    file.write_bytes(content)
    try:
        infos = read_header(file)
    except CheckpointError:
        return
    theirs = dict(safetensors.deserialize(content))
    assert {info.name: (info.dtype, list(info.shape), info.read()) for info in infos} == {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in theirs.items()
    }


@given(header=_headers, data=st.binary(max_size=20))
def test_any_header_is_refused_or_read_as_the_library_reads_it(
    header: object, data: bytes, tmp_path_factory: pytest.TempPathFactory
):
    check(container(header, data), tmp_path_factory.getbasetemp())


@given(data=st.data())
def test_a_sound_file_with_some_bytes_changed_is_refused_or_read_as_the_library_reads_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    content = bytearray(container({"a": entry(0, 4, [2], "BF16"), "b": entry(4, 6), "c": entry(6, 6)}, b"123456"))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    check(bytes(content[:cut]) if cut % 2 else bytes(content), tmp_path_factory.getbasetemp())


def write(file: Path, tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> None:
    write_safetensors(file, [(name, dtype, shape, lambda data=data: data) for name, dtype, shape, data in tensors])


_tensors = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5).filter("__metadata__".__ne__),
        st.sampled_from(["U8", "F16", "F32", "I64"]),  # by rising alignment
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    max_size=5,
    unique_by=lambda tensor: tensor[0],
)


@given(tensors=_tensors)
def test_what_we_write_equals_the_library_s_bytes(
    tensors: list[tuple[str, str, tuple[int, ...]]], tmp_path_factory: pytest.TempPathFactory
):
    types = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "I64": np.int64}
    arrays = {name: np.arange(np.prod(shape)).reshape(shape).astype(types[dtype]) for name, dtype, shape in tensors}
    ordered = sorted(tensors, key=lambda tensor: (-list(types).index(tensor[1]), tensor[0].encode()))
    filled = [(name, dtype, shape, arrays[name].tobytes()) for name, dtype, shape in ordered]
    file = tmp_path_factory.getbasetemp() / "written.safetensors"
    write(file, filled)
    assert file.read_bytes() == safetensors.numpy.save(arrays, metadata={"format": "pt"})
    read = [(info.name, info.dtype, info.shape, info.read()) for info in read_header(file)]
    assert sorted(read) == sorted(filled)


def test_tensors_are_read_one_at_a_time_and_once(file: Path):
    seen = []

    def reader(name: str) -> bytes:
        seen.append((name, file.stat().st_size if file.exists() else 0))
        return b"1" * 100_000

    write_safetensors(file, ((name, "U8", (100_000,), lambda name=name: reader(name)) for name in "cab"))
    assert [name for name, _ in seen] == ["c", "a", "b"]
    assert seen[0][1] < seen[1][1] < seen[2][1], "each is written before the next is read"
    assert [info.name for info in read_header(file)] == ["c", "a", "b"]


def test_a_tensor_of_the_wrong_size_is_refused(file: Path):
    with pytest.raises(CheckpointError, match="a has 3 bytes where its shape and dtype need 4"):
        write(file, [("a", "BF16", (2,), b"123")])


def test_a_name_given_twice_is_refused_before_anything_is_written(file: Path):
    with pytest.raises(CheckpointError, match="a would be written twice"):
        write(file, [("a", "U8", (1,), b"1"), ("a", "U8", (1,), b"2")])
    assert not file.exists()


def test_half_a_byte_is_refused_before_anything_is_written(file: Path):
    with pytest.raises(CheckpointError, match="a fills no whole bytes"):
        write(file, [("a", "F4", (3,), b"12")])
    assert not file.exists()
