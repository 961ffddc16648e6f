"""A Ray cluster on loopback: a head that computes nothing, and workers, each stopped or killed by its process id."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS = 60
ROOT = Path(__file__).parent.parent


class Cluster:
    """The processes of one cluster. Ray takes 127.0.0.1 for the address of the network card, but not the next ones."""

    def __init__(self, port: int, directory: Path) -> None:
        """Prepare a cluster whose head listens on `port`."""
        self.address = f"127.0.0.2:{port}"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = directory
        self._port = port

    def start(self) -> None:
        """Start the head."""
        options = [f"--port={self._port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={self._directory}"]
        self._start("127.0.0.2", ["--head", *options])

    def add_worker(self, number: int) -> subprocess.Popen[bytes]:
        """Start a worker with one core and return the process that holds its others."""
        return self._start(
            f"127.0.0.{2 + number}", [f"--address={self.address}", "--num-cpus=1", "--memory=4000000000"]
        )

    def _start(self, ip: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={ip}",
            "--object-store-memory=80000000", "--disable-usage-stats", *arguments,
        ]  # fmt: skip
        log = self._directory / f"{ip}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, env=self.environment, stdout=stream, stderr=stream, start_new_session=True
            )
        self._processes.append(process)
        until = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"Ray does not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a worker as a machine that loses power: every process of it, at once."""
        head = psutil.Process(process.pid)
        for one in (*head.children(recursive=True), head):
            with suppress(psutil.NoSuchProcess):  # Ray itself ends the others of a worker as soon as one is lost
                one.kill()
        process.wait(10)

    def stop(self) -> None:
        """End every process that was started, and those that they started."""
        for process in reversed(self._processes):
            if process.poll() is None:
                self.kill(process)


@contextmanager
def running_cluster(port: int) -> Iterator[Cluster]:
    """Start a cluster without workers; its sockets need a short path."""
    directory = Path(tempfile.mkdtemp(prefix="ray-"))
    cluster = Cluster(port, directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)
