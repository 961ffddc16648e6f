"""Threads that score windows of their own.

On a CPU, torch splits every operation over its threads and lets them wait for each other after it. Scoring is thousands
of operations of a tenth of a millisecond, so the waiting adds up, and on a machine shared with others it is most of
the time. Windows do not depend on each other: here each thread computes all operations of its own windows.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

Item = TypeVar("Item")
Made = TypeVar("Made")

MOST_WORKERS: Final = 4
"""Each holds the activations of a decoder pass, and all share one interpreter; torch's other threads help them."""


class Workers:
    """So many threads, each with its share of torch's; one alone is the thread that asks."""

    def __init__(self, count: int, pool: ThreadPoolExecutor | None) -> None:
        """Take what `window_workers` made."""
        self.count = count
        self._pool = pool

    def map(self, of: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
        """Return what `of` makes of each item, in their order, under `torch.inference_mode`."""
        import torch

        def run(item: Item) -> Made:
            with torch.inference_mode():  # which holds for one thread
                return of(item)

        return list(self._pool.map(run, items) if self._pool else map(run, items))


@contextlib.contextmanager
def window_workers(device: torch.device) -> Iterator[Workers]:
    """Give workers for computing on `device`: a few on a CPU, one elsewhere, where a single thread keeps it busy."""
    import torch

    threads = torch.get_num_threads()
    count = min(MOST_WORKERS, threads) if device.type == "cpu" else 1
    if count == 1:
        yield Workers(1, None)
        return
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as pool:
            # All are there before one begins: setting the number reaches into libraries that others compute with, and
            # in one of twenty runs the cosines of a first pass came out less exact.
            present = threading.Barrier(count)
            list(pool.map(lambda _: present.wait(), range(count)))
            yield Workers(count, pool)
    finally:
        torch.set_num_threads(threads)  # of threads that are yet to come; this one's never changed
