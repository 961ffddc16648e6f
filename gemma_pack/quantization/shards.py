"""The safetensors files of a variant: small enough for any registry, and the same bytes from the same inputs."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from gemma_pack.errors import QuantizationError
from gemma_pack.safetensors_file import DTYPE_BITS, TensorInfo, plan_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from gemma_pack.quantization.layout import StoredTensor

MAX_SHARD_BYTES: Final = 4_000_000_000
"""Registries take layers of 10 GB at most, pulls run in parallel, and a broken one is repeated: small shards."""
_FINISHED: Final = "finished.txt"


class _Sized(Protocol):
    @property
    def size_bytes(self) -> int: ...


S = TypeVar("S", bound=_Sized)


def divide(tensors: Iterable[S]) -> list[list[S]]:
    """Return the tensors in their order, in shards with at most `MAX_SHARD_BYTES` of data each; no shard is empty."""
    shards: list[list[S]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.size_bytes > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(tensor)
        room -= tensor.size_bytes
    return shards


def shard_name(kind: str, number: int) -> str:
    """Return `model-<kind>-<number>.safetensors`.

    The names do not count the shards, and untouched tensors have shards of their own: variants of one model then
    share those files byte for byte, and a registry stores them once.
    """
    return f"model-{kind}-{number:05}.safetensors"


def copy_shards(directory: Path, kind: str, infos: Iterable[TensorInfo]) -> None:
    """Copy tensors from where they lie into shards of that kind in `directory`."""
    for number, shard in enumerate(divide(infos), start=1):
        path = directory / shard_name(kind, number)
        header, _ = plan_safetensors(path, [(info.name, info.dtype, info.shape) for info in shard])
        with path.open("wb") as stream:
            stream.write(header)
            for info in shard:
                stream.writelines(info.pieces())


def link_shards(directory: Path, paths: Iterable[Path]) -> None:
    """Give finished shards a second name in `directory`; copy them where the file system has no hard links."""
    for path in paths:
        try:
            os.link(path, directory / path.name)
        except OSError:
            shutil.copyfile(path, directory / path.name)


class GrowingShards:
    """Shards whose headers are known before their tensors are: each tensor is written to its place once, in any order.

    Tensors come in batches. A batch that was finished stays so when the process dies, or the machine: what
    was written is on the disk before the list of finished batches says so.

    Attributes:
        finished: indices of the batches that an earlier run has finished.
        paths: the files.
    """

    def __init__(self, directory: Path, batches: Sequence[Sequence[StoredTensor]]) -> None:
        """Take up the shards in `directory` where an earlier run left them, or begin them."""
        self._places: dict[str, TensorInfo] = {}
        self._headers: dict[Path, bytes] = {}
        for number, shard in enumerate(divide(tensor for batch in batches for tensor in batch), start=1):
            path = directory / shard_name("quantized", number)
            aligned = sorted(shard, key=lambda tensor: (-DTYPE_BITS[tensor.dtype], tensor.name))
            header, infos = plan_safetensors(path, [(t.name, t.dtype, t.shape) for t in aligned])
            self._headers[path] = header
            self._places |= {info.name: info for info in infos}
        self._descriptors: dict[Path, int] = {}
        self._log = directory / _FINISHED
        self.paths = list(self._headers)
        begun = self._log.is_file() and all(_begins_with(path, header) for path, header in self._headers.items())
        lines = self._log.read_text("ascii").split("\n")[:-1] if begun else []  # the last may be torn
        self.finished = {int(line) for line in lines}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the files open for writing during the block."""
        sizes = {path: max(i.end for i in self._places.values() if i.file == path) for path in self.paths}
        try:
            for path, header in self._headers.items():
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                self._descriptors[path] = descriptor
                if not self.finished:
                    _write_all(descriptor, header, 0)
                    os.ftruncate(descriptor, sizes[path])
            if not self.finished:
                self._log.write_bytes(b"")
            yield
        finally:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, on the CPU, to its place; threads may do so at once.

        Raises:
            QuantizationError: its dtype or shape is not what the header says.
        """
        if tuple(tensor.shape) != self._places[name].shape:
            raise _misshapen(self._places[name], tensor)
        self.put_rows(name, [tensor])

    def put_rows(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write a tensor that comes in pieces along its rows, as `put` does.

        Raises:
            QuantizationError: a piece's dtype or shape is not what the header says, or there are too many or too few.
        """
        info = self._places[name]
        position = info.begin
        for piece in pieces:
            data = _raw_bytes(piece)
            alike = (_dtype_name(piece), tuple(piece.shape[1:])) == (info.dtype, info.shape[1:])
            if not alike or position + len(data) > info.end:
                raise _misshapen(info, piece)
            _write_all(self._descriptors[info.file], data, position)
            position += len(data)
        if position != info.end:
            raise QuantizationError(f"{name} became {info.end - position} bytes fewer than servers want")

    def finish(self, batch: int) -> None:
        """Say that all tensors of a batch are written."""
        for descriptor in self._descriptors.values():
            os.fdatasync(descriptor) if hasattr(os, "fdatasync") else os.fsync(descriptor)
        with self._log.open("a", encoding="ascii") as log:
            log.write(f"{batch}\n")
        self.finished.add(batch)


def _misshapen(info: TensorInfo, tensor: Tensor) -> QuantizationError:
    return QuantizationError(
        f"{info.name} became {tensor.dtype} {list(tensor.shape)}, where servers want {info.dtype} {list(info.shape)}"
    )


def _write_all(descriptor: int, data: bytes | memoryview, position: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, position)
        rest, position = rest[written:], position + written


def _begins_with(path: Path, header: bytes) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(header)) == header
    except FileNotFoundError:
        return False


def _raw_bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _dtype_name(tensor: Tensor) -> str:
    """Return the dtype as safetensors names it: `torch.float8_e4m3fn` is F8_E4M3."""
    import torch

    names = {
        torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
        torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8",
    }  # fmt: skip
    return names[tensor.dtype]
