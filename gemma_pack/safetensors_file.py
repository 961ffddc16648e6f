"""The safetensors format: headers read as strictly as the safetensors library reads them, and files written.

Only the header is held in memory; tensors are read one at a time, as bytes, so nothing here needs torch or
numpy. What passes `read_header`, the library reads too.

Source: https://github.com/huggingface/safetensors#format and `tensor.rs` there.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

MAX_HEADER_BYTES: Final = 100_000_000
"""safetensors' own limit on the header (`MAX_HEADER_SIZE` in its lib.rs)."""
LENGTH_BYTES: Final = 8
"""Of the number before the header that says how long it is."""
READ_BYTES: Final = 8 << 20
DTYPE_BITS: Final[dict[str, int]] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of an element (`Dtype::bitsize` in safetensors' tensor.rs)."""
_MAX_ELEMENTS: Final = 1 << 57
"""More would overflow the 64 bits in which safetensors counts a tensor's bits."""
_AGAIN: Final = "fetch the file again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies: `begin` and `end` are byte offsets from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> bytes:
        """Return the raw little-endian bytes of the tensor."""
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            data = stream.read(self.size_bytes)
        if len(data) != self.size_bytes:
            raise self._cut_short()
        return data

    def pieces(self) -> Iterator[bytes]:
        """Yield the raw bytes of the tensor, at most 8 MiB at a time."""
        left = self.size_bytes
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            while left:
                piece = stream.read(min(READ_BYTES, left))
                if not piece:
                    raise self._cut_short()
                yield piece
                left -= len(piece)

    def digest(self) -> str:
        """Return the sha256, in hex, of the raw bytes, holding at most 8 MiB of them."""
        state = hashlib.sha256()
        for piece in self.pieces():
            state.update(piece)
        return state.hexdigest()

    def _cut_short(self) -> CheckpointError:
        """Describe a file that has shrunk since its header was read."""
        return CheckpointError(f"{self.file} ended in the middle of {self.name}", hint=_AGAIN)


def read_header(path: Path) -> list[TensorInfo]:
    """Return the tensors that the header of the safetensors file `path` names, in file order.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is no valid header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(LENGTH_BYTES)
            head += stream.read(header_bytes(head, size) - LENGTH_BYTES) if len(head) == LENGTH_BYTES else b""
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", hint=_AGAIN) from error
    return parse_header(path, head, size)


def header_bytes(head: bytes, size_bytes: int) -> int:
    """Return the bytes of a header, the length before it included, by its first eight; 8 where no length is valid."""
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    return LENGTH_BYTES + (length if length <= min(size_bytes - LENGTH_BYTES, MAX_HEADER_BYTES) else 0)


def parse_header(path: Path, head: bytes, size: int) -> list[TensorInfo]:
    """Return the tensors of a safetensors file of `size` bytes, in file order, by its first `header_bytes` bytes.

    Raises:
        CheckpointError: the file is truncated, or its header is no valid header.
    """
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if size < LENGTH_BYTES or len(head) != LENGTH_BYTES + length:
        raise CheckpointError(f"{path} is truncated or no safetensors file", hint=_AGAIN)
    try:
        header = _parse_header(head[LENGTH_BYTES:])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt safetensors header: {error}", hint=_AGAIN) from error
    start = LENGTH_BYTES + length
    infos = [_tensor_info(path, start, name, entry) for name, entry in header.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.begin, info.end))  # an empty tensor stands before the one that begins there
    position = start
    for info in infos:
        if info.begin != position:
            raise CheckpointError(f"{path} has a gap or an overlap before {info.name}", hint=_AGAIN)
        position = info.end
    if position != size:
        problem = "is truncated" if position > size else "has bytes after its last tensor"
        raise CheckpointError(f"{path} {problem}: {size} bytes, its header promises {position}", hint=_AGAIN)
    return infos


def plan_safetensors(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[TensorInfo]]:
    """Return the header of a file for tensors, given as (name, dtype, shape), and where in `path` each of them lies.

    The header is padded to 8 bytes, as safetensors' own writer does; it also sorts tensors by falling alignment, then
    by name, which is left to the caller.

    Raises:
        CheckpointError: two tensors have one name, or one of them fills no whole bytes.
    """
    entries = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in entries:
        size, rest = divmod(math.prod(shape) * DTYPE_BITS[dtype], 8)
        if name in header or rest:
            raise CheckpointError(f"{name} {'fills no whole bytes' if rest else 'would be written twice'}")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)
    infos = [_tensor_info(path, start, name, header[name]) for name, _, _ in entries]
    return len(encoded).to_bytes(8, "little") + encoded, infos


def write_safetensors(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], bytes]]]) -> None:
    """Write tensors, given as (name, dtype, shape, read), to `path`, one in memory at a time.

    `read` is called once, in order.

    Raises:
        CheckpointError: what `plan_safetensors` raises, or `read` gives another number of bytes than shape and dtype
            need.
    """
    entries = list(tensors)
    header, infos = plan_safetensors(path, [(name, dtype, shape) for name, dtype, shape, _ in entries])
    with path.open("wb") as stream:
        stream.write(header)
        for info, (_, _, _, read) in zip(infos, entries, strict=True):
            data = read()
            if len(data) != info.size_bytes:
                raise CheckpointError(
                    f"{info.name} has {len(data)} bytes where its shape and dtype need {info.size_bytes}"
                )
            stream.write(data)


def _parse_header(encoded: bytes) -> dict[str, Any]:
    """Return the JSON object of a header, as strictly as safetensors reads it; raise ValueError else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a name stands twice")
        return values

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    header = json.loads(encoded.decode(), object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(header, dict):
        raise ValueError("it is no object")  # noqa: TRY004 - a broken file, like every other ValueError here
    metadata = header.get("__metadata__")
    metadata = {} if metadata is None else metadata  # null is none, as the library reads it; 0 and "" are not
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ maps names to something else than text")
    return header


def _tensor_info(path: Path, start: int, name: str, entry: Any) -> TensorInfo:  # noqa: ANN401 - parsed JSON
    try:
        name.encode()  # half a surrogate pair, which JSON can write and nothing else can
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        if not numbers or math.prod(n or 1 for n in shape) > _MAX_ELEMENTS:
            raise ValueError("shape or data_offsets")
        bits = DTYPE_BITS.get(dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a corrupt entry for {name!r}", hint=_AGAIN) from error
    if bits is None:
        raise CheckpointError(f"{path}: {name} has dtype {dtype}, which is not known", hint=_AGAIN)
    if 8 * (end - begin) != math.prod(shape) * bits:
        raise CheckpointError(f"{path}: shape, dtype and offsets of {name} disagree", hint=_AGAIN)
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), file=path, begin=start + begin, end=start + end)
