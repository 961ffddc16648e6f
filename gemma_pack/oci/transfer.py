"""What pushing and pulling have in common: two blobs at a time, and one end for both."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WORKERS: Final = 2
"""Two streams fill most links, and hash on two cores; each holds a few MiB."""
GRACE_S: Final = 2.0
"""How long an error or Ctrl-C waits for threads to end; one that hangs on a dead connection would take a minute."""

T = TypeVar("T")


def in_parallel(jobs: Sequence[Callable[[], T]], stop: threading.Event, workers: int = WORKERS) -> list[T]:
    """Run `jobs`, `workers` at a time, and return their results in order.

    The first error, or an interrupt, sets `stop`, which running jobs obey before they do anything more, and is raised;
    jobs that wait are never begun.
    """
    futures: list[Future[T]] = [Future() for _ in jobs]
    waiting = deque(zip(futures, jobs, strict=True))

    def work() -> None:
        while waiting and not stop.is_set():
            try:
                future, job = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
                future.set_exception(error)

    # Daemons, and no ThreadPoolExecutor: Python waits for an executor's threads before it exits, whatever they hang on.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]
    except BaseException:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join(GRACE_S)
        raise
