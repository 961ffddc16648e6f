from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from gemma_pack.errors import RegistryError
from gemma_pack.oci.transfer import in_parallel


def test_results_come_in_order():
    assert in_parallel([lambda: (time.sleep(0.05), 1)[1], lambda: 2, lambda: 3], threading.Event()) == [1, 2, 3]
    assert in_parallel([], threading.Event()) == []


def test_two_jobs_run_at_a_time():
    both = threading.Barrier(2, timeout=10)
    assert len(in_parallel([both.wait, both.wait], threading.Event())) == 2
    most, running, lock = [0], [0], threading.Lock()

    def job() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1

    in_parallel([job] * 8, threading.Event())
    assert most == [2]


def test_the_first_error_stops_the_others_and_is_the_one_raised():
    stop = threading.Event()
    begun: list[int] = []

    def fail() -> None:
        raise RegistryError("first")

    def wait() -> None:
        begun.append(1)
        assert stop.wait(10)
        raise RegistryError("stopped")

    begin_s = time.monotonic()
    with pytest.raises(RegistryError, match="first"):
        in_parallel([wait, fail, wait, wait], stop)
    assert time.monotonic() - begin_s < 5
    assert len(begun) <= 2


def test_an_interrupt_in_a_job_is_an_interrupt():
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_parallel([interrupt], threading.Event())


def test_a_thread_that_hangs_does_not_keep_the_process():
    code = """
import threading, time
from gemma_pack.oci import transfer
transfer.GRACE_S = 0.1
def fail(): raise ValueError("first")
transfer.in_parallel([lambda: time.sleep(60), fail], threading.Event())
"""
    begin_s = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=30, text=True)
    assert ended.stderr.endswith("ValueError: first\n")
    assert time.monotonic() - begin_s < 20
