"""A checkpoint: a directory of safetensors with its config and tokenizer.

Opening one reads only the headers and checks all that they promise: shards that exist and are whole, an
index that agrees, offsets inside the file. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.errors import CheckpointError
from gemma_pack.safetensors_file import READ_BYTES, TensorInfo, read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
RECORD_NAME: Final = "gemma-pack.json"
ADAPTER_NAME: Final = "adapter_config.json"
"""What peft keeps beside an adapter, and what transformers and vLLM then take the directory for."""
MERGE_FIRST: Final = "merge it into its base first (peft: merge_and_unload), and save that"
PICKLED_SUFFIXES: Final = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_WEIGHT_SUFFIXES: Final = frozenset({".gguf", ".h5", ".msgpack", ".onnx", ".safetensors"})
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model")
_AGAIN: Final = "fetch the file again"


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
        if (directory / "oci-layout").is_file():
            raise CheckpointError(
                f"{directory} is an OCI layout, not a checkpoint",
                hint=f"gemma-pack pull {directory} -o DIR takes the checkpoint out of it",
            )
        if (directory / ADAPTER_NAME).is_file() and not (directory / "config.json").exists():
            raise CheckpointError(f"{directory} is a LoRA adapter, not a model", hint=MERGE_FIRST)
        config = read_json(directory / "config.json")
        weight_map = _weight_map(directory)
        tensors: dict[str, TensorInfo] = {}
        for shard in _shards(directory, weight_map):
            for info in read_header(shard):
                if info.name in tensors:
                    raise CheckpointError(
                        f"tensor {info.name} is in {tensors[info.name].file.name} and again in {shard.name}",
                        hint="the checkpoint mixes two exports; fetch it again into an empty directory",
                    )
                tensors[info.name] = info
        if weight_map is not None:
            _check_index(weight_map, tensors)
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
        """Return the sha256, in hex, of the raw bytes of tensor `name`."""
        return self.tensors[name].digest()

    def require_tokenizer(self) -> None:
        """Raise CheckpointError unless the directory has a tokenizer."""
        if not any((self.directory / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"{self.directory} has no tokenizer ({' or '.join(TOKENIZER_FILES)})",
                hint="copy the tokenizer files of the model into it",
            )

    def companions(self) -> list[Path]:
        """Return the files that are neither weights of any format, index nor record, sorted.

        What a trainer leaves beside them, such as an optimizer's state in a pickle, counts as weights, and so does the
        config of an adapter.
        """
        skipped, weights = {INDEX_NAME, RECORD_NAME, ADAPTER_NAME}, PICKLED_SUFFIXES | _WEIGHT_SUFFIXES
        return sorted(
            path
            for path in self.directory.iterdir()
            if path.is_file() and path.suffix not in weights and path.name not in skipped and path.name[0] != "."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raise CheckpointError where it is missing or broken."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}", hint="pass the directory of a complete checkpoint"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise CheckpointError(f"{path} is not JSON: {error}", hint=_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", hint=_AGAIN)
    return value


def file_sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Return the sha256 of a file in hex; `advance` is told of each piece's size in bytes."""
    state = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            state.update(piece)
            if advance:
                advance(len(piece))
    return state.hexdigest()


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


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Return which shard holds which tensor by the index, or None where there is no index."""
    path = directory / INDEX_NAME
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map", hint=_AGAIN)
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} names {name}, which is no safetensors file beside it",
                hint="do not use this checkpoint: fetch it again from where you trust it",
            )
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{INDEX_NAME} names {name}, which is missing from {directory}", hint="fetch the missing shard"
            )
    if (directory / SINGLE_NAME).exists() and SINGLE_NAME not in weight_map.values():
        raise CheckpointError(
            f"{directory} has both {SINGLE_NAME} and an index of other shards, and readers differ on which counts",
            hint="the directory mixes two exports; fetch the checkpoint into an empty one",
        )
    return weight_map


def _shards(directory: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    if weight_map is not None:
        return [directory / name for name in sorted(set(weight_map.values()))]
    single = directory / SINGLE_NAME
    if single.is_file():
        return [single]
    if any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{directory} has safetensors shards but no {INDEX_NAME}", hint="fetch the index beside the shards"
        )
    raise CheckpointError(
        f"{directory} has no {SINGLE_NAME}",
        hint="only safetensors are read; pickled .bin weights are refused because loading them runs their code",
    )


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    hint = "index and shards are from two exports; fetch the checkpoint again"
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{INDEX_NAME} says that {shard} holds {name}, and it does not", hint=hint)
    for name in tensors.keys() - weight_map.keys():
        raise CheckpointError(f"{tensors[name].file.name} holds {name}, which {INDEX_NAME} does not name", hint=hint)
