"""The hidden states of calibration windows as they travel through the decoder, on the CPU or in a file.

A run that is killed must not run the windows through every layer again: the states are written beside the finished
layers whenever that costs little of the time that it would save.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from typing import TYPE_CHECKING, Any, Final, Self

import torch

from gemma_pack.quantization.input_statistics import InputStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    from gemma_pack.quantization.decoder import Decoder
    from gemma_pack.quantization.kv_cache import KeyValueRange
    from gemma_pack.quantization.ranks import Ranks

_TOKENS_A_BATCH: Final = 4096
"""Tokens in one forward call: enough to keep two cores or a GPU busy, few enough for 2 GB of memory."""
MAX_STATES_IN_MEMORY_BYTES: Final = 8_000_000_000
"""Hidden states beyond this lie in a file: 512 x 2048 tokens of a 9B are 7.5 GB, of a 27B 9.7 GB."""
_SHARE_FOR_KEEPING: Final = 0.1
"""Of the time that layers take, at most this goes into keeping states; a fast disk keeps those of every layer."""


class HiddenStates:
    """Hidden states [windows, tokens, width] and the way through the next layer."""

    def __init__(
        self, decoder: Decoder, ids: np.ndarray[Any, np.dtype[np.int32]], directory: Path, ranks: Ranks
    ) -> None:
        """Embed int32 [windows, tokens]; states beyond `MAX_STATES_IN_MEMORY_BYTES` lie in a file in `directory`."""
        self.decoder, self.ranks = decoder, ranks
        self.batch = max(1, _TOKENS_A_BATCH // ids.shape[1])
        self.directory, self.file = directory, directory / f"states-{ranks.rank}"
        shape = (*ids.shape, decoder.width)
        if 2 * math.prod(shape) <= MAX_STATES_IN_MEMORY_BYTES:
            self.states = torch.empty(shape, dtype=torch.bfloat16)
        else:
            size = math.prod(shape)
            with self.file.open("wb") as stream:  # else a disk that fills up later ends the process by a bus error
                os.posix_fallocate(stream.fileno(), 0, 2 * size)
            self.states = torch.from_file(str(self.file), shared=True, size=size, dtype=torch.bfloat16).view(shape)
        self._ids = ids
        self._arguments: dict[int, dict[str, dict[str, Any]]] = {}
        self._kept_at, self._keeping_seconds = time.monotonic(), 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.unlink(missing_ok=True)

    def begin(self, wanted: int) -> int:
        """Fill in the states that enter a layer, at most layer `wanted`, and return which: as far as there are kept."""
        kept = {int(path.suffix[1:]): path for path in self._kept()}
        for index in sorted(kept, reverse=True):
            if index <= wanted and self._read(kept[index]):
                return index
        for begin in range(0, len(self._ids), self.batch):
            self.states[begin : begin + self.batch] = self.decoder.embed(self._ids[begin : begin + self.batch])
        return 0

    def keep(self, following: int) -> None:
        """Write the states that enter layer `following`, unless that would take too much of the time or of the disk.

        Several processes would have to agree on what is kept; they keep nothing.
        """
        now = time.monotonic()
        if self.ranks.size > 1 or self._keeping_seconds > _SHARE_FOR_KEEPING * (now - self._kept_at):
            return
        if shutil.disk_usage(self.directory).free < 2 * len(self._bytes()):  # the layers still to come need room, too
            return
        earlier = self._kept()
        part = self.directory / "kept.part"
        with part.open("wb", buffering=0) as stream:
            view = self._bytes()
            while view:
                view = view[stream.write(view) :]
            os.fsync(stream.fileno())
        part.replace(self.directory / f"kept.{following}")
        for path in earlier:
            path.unlink()
        self._kept_at = time.monotonic()
        self._keeping_seconds = self._kept_at - now

    def _kept(self) -> list[Path]:
        return [path for path in self.directory.glob("kept.*") if path.suffix != ".part"]

    def _read(self, path: Path) -> bool:
        """Fill the states from a file; say whether it has all of them."""
        view = self._bytes()
        if path.stat().st_size != len(view):
            return False
        with path.open("rb", buffering=0) as stream:
            while view and (count := stream.readinto(view)):
                view = view[count:]
        return not view

    def _bytes(self) -> memoryview:
        return self.states.view(torch.uint8).reshape(-1).numpy().data

    @torch.no_grad()
    def advance(
        self, index: int, observed: Sequence[Sequence[str]], cache: KeyValueRange | None = None
    ) -> list[InputStatistics]:
        """Replace the states by what layer `index` makes of them.

        Args:
            index: the layer, whose weights are loaded for it.
            observed: groups of linears that share an input, by module name.
            cache: sees the layer's keys and values.

        Returns:
            For each group the statistics of its input, over the windows of all processes.
        """
        batches = torch.split(self.states, self.batch) if len(self.states) else ()  # more processes than windows
        for windows, tokens, _ in {batch.shape for batch in batches}:
            if windows not in self._arguments:  # asked before there are hooks: the answer takes a pass over padding
                self._arguments[windows] = self.decoder.layer_arguments(windows, tokens)
        layer = self.decoder.load_layer(index)
        linears: list[Any] = [layer.get_submodule(self.decoder.within_layer(group[0])) for group in observed]
        statistics = [InputStatistics(linear.in_features, self.decoder.device) for linear in linears]

        def adder(seen: InputStatistics) -> Any:  # noqa: ANN401 - the type of a torch hook
            return lambda _module, inputs: seen.add(inputs[0])

        hooks = [
            linear.register_forward_pre_hook(adder(seen)) for linear, seen in zip(linears, statistics, strict=True)
        ]
        try:
            for states in batches:
                arguments = self._arguments[len(states)][self.decoder.kinds[index]]
                states.copy_(layer(states.to(self.decoder.device), past_key_values=cache, **arguments))
        finally:
            for hook in hooks:
                hook.remove()
        for seen in statistics:
            seen.merge(self.ranks)
        if cache:
            cache.merge(self.ranks)
        return statistics
