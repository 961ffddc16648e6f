"""The data-free path: each linear layer's weight goes from its file, a few rows at a time, to its place in a shard.

No model is built and no text is read, and no weight is ever held whole, so memory does not grow with the model and by
a few pieces only with the number of cores. No byte is written twice: the shards grow in the run's journal and are
linked into the variant when they are whole.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

import torch

from gemma_pack.errors import CheckpointError
from gemma_pack.gemma import checkpoint_linears
from gemma_pack.quantization.layout import stored_tensors
from gemma_pack.quantization.shards import GrowingShards

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from torch import Tensor

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Reporter
    from gemma_pack.quantization.journal import Journal
    from gemma_pack.recipe import Recipe
    from gemma_pack.safetensors_file import TensorInfo

_ELEMENTS_A_PIECE: Final = 1 << 18
"""Weights that are rounded at once: their float32 copies stay in a core's cache, which is three times as fast as going
over the whole matrix, and the handful of operations on them still take far longer than calling them."""
_MOST_WORKERS: Final = 8
"""Each holds some 9 MB, which must not add up on a machine of a hundred cores; beyond eight the disk decides."""


class RowFormat(Protocol):
    """How rows of a weight become the tensors that stand for them on disk."""

    divisor: int
    """What the number of rows in a piece is a multiple of."""
    codes: str
    """The last part of the codes' name. They are the bulk, and written as they come, piece by piece."""

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """Return what stands for bfloat16 [rows, columns], by the names' last part; each tensor begins with rows."""

    def finish(self, shape: tuple[int, ...], joined: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what stands for the whole weight beside its codes; `joined` are the pieces joined along the rows."""


def quantize_streamed(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    ignored: Collection[str],
    device: torch.device,
    journal: Journal,
    reporter: Reporter,
) -> list[Path]:
    """Round each decoder layer's linears to nearest and return the shards that hold them, in the journal.

    Args:
        checkpoint: the bf16 source.
        recipe: how to round; of the algorithm `nearest`.
        ignored: module names that stay in bf16.
        device: where to round.
        journal: holds the shards while they grow; what an earlier run finished there is not done again.
        reporter: shows progress.
    """
    layers = [
        {name: checkpoint.tensors[f"{name}.weight"] for group in groups if group[0] not in ignored for name in group}
        for groups in checkpoint_linears(checkpoint)
    ]
    rows = row_format(recipe, device)
    shards = GrowingShards(
        journal.directory,
        [[t for name, info in layer.items() for t in stored_tensors(name, info.shape, recipe)] for layer in layers],
    )
    if shards.finished:
        reporter.status(f"going on after {len(shards.finished)} finished layers")

    with shards.opened(), _workers() as pool, reporter.progress("quantize layers", len(layers)) as task:
        pending = {
            index: [pool.submit(_quantize, name, info, rows, shards) for name, info in layer.items()]
            for index, layer in enumerate(layers)
            if index not in shards.finished
        }
        task.advance(len(layers) - len(pending))
        for index, futures in pending.items():
            for future in futures:
                future.result()
            shards.finish(index)
            task.advance()
    return shards.paths


def row_format(recipe: Recipe, device: torch.device) -> RowFormat:
    """Return the format of a recipe that needs no data."""
    if recipe.scheme == "BNB_INT8":
        from gemma_pack.quantization.bitsandbytes import Int8Rows

        return Int8Rows()
    if recipe.scheme == "BNB_NF4":
        from gemma_pack.quantization.bitsandbytes import Nf4Rows

        return Nf4Rows()
    from gemma_pack.quantization.nearest import CompressedRows

    return CompressedRows(recipe, device)


def _quantize(name: str, info: TensorInfo, rows: RowFormat, shards: GrowingShards) -> None:
    """Write what stands for the weight at `info` to its places."""
    count = max(rows.divisor, _ELEMENTS_A_PIECE // info.shape[1] // rows.divisor * rows.divisor)
    beside: list[dict[str, Tensor]] = []

    def codes() -> Iterator[Tensor]:
        for piece in _read_rows(info, count):
            encoded = rows.encode(piece)
            beside.append(encoded)
            yield encoded.pop(rows.codes)

    shards.put_rows(f"{name}.{rows.codes}", codes())
    joined = {suffix: torch.cat([piece[suffix] for piece in beside]) for suffix in beside[0]}
    for suffix, tensor in rows.finish(info.shape, joined).items():
        shards.put(f"{name}.{suffix}", tensor)


def _read_rows(info: TensorInfo, count: int) -> Iterator[Tensor]:
    """Read the bfloat16 matrix at `info`, at most `count` rows at a time."""
    total, columns = info.shape
    with info.file.open("rb", buffering=0) as stream:
        stream.seek(info.begin)
        for begin in range(0, total, count):
            piece = torch.empty((min(count, total - begin), columns), dtype=torch.bfloat16)
            view = piece.view(torch.uint8).reshape(-1).numpy().data
            while view:
                length = stream.readinto(view)
                if not length:
                    raise CheckpointError(f"{info.file} ended in the middle of {info.name}", hint="fetch it again")
                view = view[length:]
            yield piece


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Run weights side by side, one core each, which beats sharing the cores within operations as short as ours.

    Where the block fails, what has not begun is dropped.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        max_workers=min(os.cpu_count() or 1, _MOST_WORKERS), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what worker threads set holds for threads that start later
