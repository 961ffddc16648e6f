"""The processes of one run: one alone, or several that torchrun started.

Each takes its share of the calibration windows; sums and maxima go over all. They share a file system, and what one
has written is there for the others after `wait`.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from gemma_pack.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from torch import Tensor

LONGEST_WAIT: Final = timedelta(days=2)
"""The others wait while the first downloads, rounds what needs no text, and hashes: torch gives up after ten minutes
with NCCL. Where a process dies, torchrun ends the others."""
Windows = TypeVar("Windows", "np.ndarray[Any, Any]", "Tensor")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this one is."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, windows: Windows) -> Windows:
        """Return this process's part of an array or tensor [windows, ...]: every `size`-th."""
        return windows[self.rank :: self.size]

    def takes(self, number: int) -> bool:
        """Say whether piece `number` of work that is divided among the processes is this one's."""
        return number % self.size == self.rank

    def add(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over all processes."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def maximum(self, tensor: Tensor) -> None:
        """Replace the tensor by its maximum over all processes."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            torch.distributed.barrier()


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """Give the place of this process among those that torchrun started, by its environment variables.

    Raises:
        MachineError: there are more processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise MachineError(
                f"process {local + 1} on this machine has no GPU of its own",
                hint=f"start torchrun with --nproc-per-node {torch.cuda.device_count()}",
            )
        torch.cuda.set_device(local)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    try:
        yield Ranks(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
