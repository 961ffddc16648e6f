"""The quantized layers of a checkpoint as the numbers that a server computes with, a few rows at a time."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from compressed_tensors.quantization import QuantizationScheme
    from torch import Tensor

    from gemma_pack.checkpoint import Checkpoint

_SCALE: Final = ".weight_scale"
_BY_ROW: Final = ("weight", "weight_packed", "weight_scale")
"""Tensors of a layer whose first dimension goes with its rows, or with its rows of blocks."""


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """A checkpoint whose files are open, so that rows of a tensor can be read alone."""

    checkpoint: Checkpoint
    files: Mapping[Path, Any]

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Return rows [begin, end) of tensor `name`, all of them by default."""
        rows: Tensor = self.files[self.checkpoint.tensors[name].file].get_slice(name)[begin:end]
        return rows


@contextmanager
def opened(checkpoint: Checkpoint) -> Iterator[OpenedCheckpoint]:
    """Hold the safetensors files of a checkpoint open."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(str(path), framework="pt")) for path in checkpoint.shards}
        yield OpenedCheckpoint(checkpoint, files)


class QuantizedWeights:
    """The layers of a compressed-tensors checkpoint that have scales.

    Attributes:
        layers: their module names, sorted.
        scheme_name: the name that recipes have for their scheme.
        block_rows: rows that share scales; blocks of rows begin at multiples of it.
    """

    def __init__(self, source: OpenedCheckpoint) -> None:
        """Read from config.json how the layers are quantized.

        Raises:
            CheckpointError: it does not say so by one scheme.
        """
        tensors = source.checkpoint.tensors
        self._source = source
        self.layers = sorted(name.removesuffix(_SCALE) for name in tensors if name.endswith(_SCALE))
        self._scheme = _read_scheme(source.checkpoint)
        self.scheme_name = _name_scheme(self._scheme)
        block: list[int] | None = self._scheme.weights.block_structure
        self.block_rows = block[0] if block else 1
        self._block_columns = block[1] if block else None

    def group_width(self, columns: int) -> int:
        """Return how many columns of a row share a scale; all of them where rows or the whole layer do."""
        size = self._scheme.weights.group_size
        return int(size) if size and size > 0 else self._block_columns or columns

    def rows(self, layer: str, begin: int, end: int, device: str) -> Tensor:
        """Return rows [begin, end) of a layer, float32; `begin` is a multiple of `block_rows`."""
        import torch
        from compressed_tensors.compressors import BaseCompressor

        state = {}
        for key in ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_global_scale"):
            info = self._source.checkpoint.tensors.get(f"{layer}.{key}")
            if info is None:
                continue
            if key == "weight_shape":
                columns = int(self._source.rows(info.name)[1])
                state[key] = torch.tensor([end - begin, columns])
            elif key in _BY_ROW and len(info.shape) == 2:
                per = self.block_rows if key == "weight_scale" else 1
                state[key] = self._source.rows(info.name, begin // per, -(-end // per)).to(device)
            else:
                state[key] = self._source.rows(info.name).to(device)
        compressor = BaseCompressor.get_value_from_registry(self._scheme.format)
        weight: Tensor = compressor.decompress(state, self._scheme)["weight"]
        return weight.float()


def _read_scheme(checkpoint: Checkpoint) -> QuantizationScheme:
    """Return the one scheme that config.json declares, as compressed-tensors and the servers read it."""
    from compressed_tensors.quantization import QuantizationConfig

    try:
        config = QuantizationConfig.model_validate(checkpoint.config["quantization_config"])
        [scheme] = config.config_groups.values()
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'} does not say by one scheme how the layers are quantized",
            hint="quantize again",
        ) from error
    return scheme.model_copy(update={"format": scheme.format or config.format})


def _name_scheme(scheme: QuantizationScheme) -> str:
    weights = scheme.weights
    kind = f"{weights.type}{weights.num_bits}"
    if kind == "float8":
        return {"tensor": "FP8", "block": "FP8_BLOCK"}.get(weights.strategy, "FP8_DYNAMIC")
    if kind == "int8":
        return "W8A8" if scheme.input_activations else "W8A16"
    if kind in ("int4", "float4"):
        return {"int4": "W4A16", "float4": "NVFP4"}[kind]
    raise CheckpointError(f"layers are quantized to {kind}, which the weight audit does not know")
