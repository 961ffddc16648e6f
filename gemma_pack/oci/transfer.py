"""What pushing and pulling have in common: two blobs at a time, and one end for both."""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

WORKERS: Final = 2
"""Two streams fill most links, and hash on two cores; each holds a few MiB."""

T = TypeVar("T")


def in_parallel(jobs: Sequence[Callable[[], T]], stop: threading.Event, workers: int = WORKERS) -> list[T]:
    """Run `jobs`, `workers` at a time, and return their results in order.

    The first error, or an interrupt, sets `stop`, which running jobs obey, cancels those that wait, and is raised.
    """
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(job) for job in jobs]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
