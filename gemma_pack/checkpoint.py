"""A checkpoint: a directory of safetensors with its config and tokenizer.

Opening one reads only the headers and checks all that they promise: shards that exist and are whole, an
index that agrees, offsets inside the file. Bytes are read by tensor, so nothing here needs torch.
Writing goes to a staging directory beside the target that is renamed when all is there, so a checkpoint
appears whole or not at all.

Source of the format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.console import format_bytes
from gemma_pack.errors import CheckpointError, InvalidUsageError, MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
RECORD_NAME: Final = "gemma-pack.json"
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model")
MAX_HEADER_BYTES: Final = 100_000_000
"""safetensors' own limit on the header (`MAX_HEADER_SIZE` in its lib.rs)."""
READ_BYTES: Final = 8 << 20
DTYPE_BITS: Final[dict[str, int]] = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip


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
            raise CheckpointError(f"{self.file} ended in the middle of {self.name}", hint="fetch the checkpoint again")
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: its parsed config and the place of each tensor."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read config and headers of `directory`, and check what they promise.

        Raises:
            CheckpointError: a file is missing, truncated, corrupt or at odds with the index.
        """
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} is not a directory", hint="pass a directory that holds config.json and safetensors files"
            )
        config = read_json(directory / "config.json")
        shards = _shards(directory)
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for info in read_header(shard):
                if info.name in tensors:
                    raise CheckpointError(
                        f"tensor {info.name} is in {tensors[info.name].file.name} and again in {shard.name}",
                        hint="the checkpoint mixes two exports; fetch it again into an empty directory",
                    )
                tensors[info.name] = info
        _check_index(directory, tensors)
        return cls(directory=directory, config=config, tensors=tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensor data."""
        return sum(info.size_bytes for info in self.tensors.values())

    @property
    def shards(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return sorted({info.file for info in self.tensors.values()})

    def digest(self, name: str) -> str:
        """Return the sha256, in hex, of the raw bytes of tensor `name`, holding at most 8 MiB of them."""
        info = self.tensors[name]
        with info.file.open("rb") as stream:
            stream.seek(info.begin)
            return _sha256(stream.read, info.size_bytes)

    def require_tokenizer(self) -> None:
        """Raise CheckpointError unless the directory has a tokenizer."""
        if not any((self.directory / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"{self.directory} has no tokenizer ({' or '.join(TOKENIZER_FILES)})",
                hint="copy the tokenizer files of the model into it",
            )

    def companions(self) -> list[Path]:
        """Return the files that are neither weights, index nor record, sorted: config, tokenizer, licence."""
        skipped = {INDEX_NAME, RECORD_NAME}
        return sorted(
            path
            for path in self.directory.iterdir()
            if path.is_file() and path.suffix != ".safetensors" and path.name not in skipped and path.name[0] != "."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raise CheckpointError where it is missing or broken."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}", hint="pass the directory of a complete checkpoint"
        ) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", hint="fetch the file again")
    return value


def read_header(path: Path) -> list[TensorInfo]:
    """Return the tensors that the header of the safetensors file `path` names, in file order.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is no valid header.
    """
    again = "fetch the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated or no safetensors file", hint=again)
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", hint=again) from error
    except ValueError as error:
        raise CheckpointError(f"{path} has a corrupt safetensors header", hint=again) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a corrupt safetensors header", hint=again)
    start = 8 + length
    infos = [_tensor_info(path, start, size, name, entry) for name, entry in header.items() if name != "__metadata__"]
    infos.sort(key=lambda info: info.begin)
    position = start
    for info in infos:
        if info.begin != position:
            raise CheckpointError(f"{path} has a gap or an overlap before {info.name}", hint=again)
        position = info.end
    if position != size:
        problem = "is truncated" if position > size else "has bytes after its last tensor"
        raise CheckpointError(f"{path} {problem}: {size} bytes, its header promises {position}", hint=again)
    return infos


def file_sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Return the sha256 of a file in hex; `advance` is told of each piece's size in bytes."""
    with path.open("rb") as stream:
        return _sha256(stream.read, None, advance)


def write_safetensors(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], bytes]]]) -> None:
    """Write tensors, given as (name, dtype, shape, read), to `path`, one in memory at a time.

    The header is padded to 8 bytes, as safetensors' own writer does. `read` is called once, in order.
    """
    entries = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, _ in entries:
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
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


def write_index(directory: Path, infos: Iterable[TensorInfo]) -> None:
    """Write model.safetensors.index.json for the tensors, unless one file named model.safetensors holds them all."""
    infos = list(infos)
    if {info.file.name for info in infos} == {SINGLE_NAME}:
        return
    index = {
        "metadata": {"total_size": sum(info.size_bytes for info in infos)},
        "weight_map": {info.name: info.file.name for info in sorted(infos, key=lambda info: info.name)},
    }
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target` when the block ends without an error.

    Files get mode 0644 and directories 0755, so that a server under another user can read them.

    Raises:
        InvalidUsageError: `target` exists already and is not an empty directory.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield staging
        for path in (staging, *staging.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            staging.rename(target)
        except OSError:
            refuse_existing(target)  # another process put something there meanwhile
            raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def require_space(target: Path, size_bytes: int) -> None:
    """Raise MachineError unless the disk that will hold `target` has `size_bytes` free."""
    existing = next(place for place in (target, *target.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < size_bytes:
        raise MachineError(
            f"{target} needs {format_bytes(size_bytes)} and the disk has {format_bytes(free)} free",
            hint="free some space, or choose a directory on another disk with -o",
        )


def refuse_existing(target: Path) -> None:
    """Raise InvalidUsageError if `target` exists and is anything but an empty directory."""
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise InvalidUsageError(f"{target} is in the way", hint="choose another directory with -o, or remove it first")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by a file that holds `data`, in one step, mode 0644."""
    encoded = data.encode() if isinstance(data, str) else data
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(encoded)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _shards(directory: Path) -> list[Path]:
    index_path = directory / INDEX_NAME
    if not index_path.exists():
        single = directory / SINGLE_NAME
        if single.exists():
            return [single]
        if any(directory.glob("*.safetensors")):
            raise CheckpointError(
                f"{directory} has safetensors shards but no {INDEX_NAME}", hint="fetch the index beside the shards"
            )
        raise CheckpointError(
            f"{directory} has no {SINGLE_NAME}",
            hint="only safetensors are read; pickled .bin weights are refused because loading them runs their code",
        )
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index_path} has no weight_map", hint="fetch the file again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index_path} names a shard outside its directory: {name}")
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{INDEX_NAME} names {name}, which is missing from {directory}", hint="fetch the missing shard"
            )
    return [directory / name for name in names]


def _check_index(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    path = directory / INDEX_NAME
    if not path.exists():
        return
    for name, shard in read_json(path)["weight_map"].items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{INDEX_NAME} says that {shard} holds {name}, and it does not",
                hint="index and shards are from two exports; fetch the checkpoint again",
            )


def _tensor_info(path: Path, start: int, size: int, name: str, entry: Any) -> TensorInfo:  # noqa: ANN401 - parsed JSON
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = (
            all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            and end - begin == math.prod(shape) * DTYPE_BITS[dtype] // 8
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a corrupt entry for {name}", hint="fetch the file again") from error
    if not sound:
        raise CheckpointError(f"{path}: shape, dtype and offsets of {name} disagree", hint="fetch the file again")
    if start + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {start + end}, the file at {size}", hint="fetch the file again"
        )
    return TensorInfo(name=name, dtype=dtype, shape=shape, file=path, begin=start + begin, end=start + end)


def _sha256(read: Callable[[int], bytes], size_bytes: int | None, advance: Callable[[int], None] | None = None) -> str:
    """Hash what `read` returns: `size_bytes` of it, or all until it returns nothing."""
    state = hashlib.sha256()
    left = size_bytes
    while left is None or left > 0:
        piece = read(READ_BYTES if left is None else min(READ_BYTES, left))
        if not piece:
            break
        state.update(piece)
        if left is not None:
            left -= len(piece)
        if advance:
            advance(len(piece))
    return state.hexdigest()
