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
    from collections.abc import Callable, Iterable
    from pathlib import Path

MAX_HEADER_BYTES: Final = 100_000_000
"""safetensors' own limit on the header (`MAX_HEADER_SIZE` in its lib.rs)."""
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

    def digest(self) -> str:
        """Return the sha256, in hex, of the raw bytes, holding at most 8 MiB of them."""
        state = hashlib.sha256()
        left = self.size_bytes
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            while left:
                piece = stream.read(min(READ_BYTES, left))
                if not piece:
                    raise self._cut_short()
                state.update(piece)
                left -= len(piece)
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
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated or no safetensors file", hint=_AGAIN)
            header = _parse_header(stream.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", hint=_AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt safetensors header: {error}", hint=_AGAIN) from error
    start = 8 + length
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


def write_safetensors(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], bytes]]]) -> None:
    """Write tensors, given as (name, dtype, shape, read), to `path`, one in memory at a time.

    The header is padded to 8 bytes, as safetensors' own writer does; it also sorts tensors by falling alignment, then
    by name, which is left to the caller. `read` is called once, in order.

    Raises:
        CheckpointError: two tensors have one name, or `read` gives another number of bytes than shape and dtype need.
    """
    entries = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, _ in entries:
        size, rest = divmod(math.prod(shape) * DTYPE_BITS[dtype], 8)
        if name in header or rest:
            raise CheckpointError(f"{name} {'fills no whole bytes' if rest else 'would be written twice'}")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for name, _, _, read in entries:
            data = read()
            begin, end = header[name]["data_offsets"]
            if len(data) != end - begin:
                raise CheckpointError(f"{name} has {len(data)} bytes where its shape and dtype need {end - begin}")
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
    metadata = header.get("__metadata__") or {}
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
