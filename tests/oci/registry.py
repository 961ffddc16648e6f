"""A real registry, Debian's docker-registry 2.8, on a free loopback port with its data in a temporary directory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USER, PASSWORD = "hilbert", "open sesame"
_HTPASSWD = USER + ":$2y$04$abcdefghijklmnopqrstuu/LVz6MZlItEy42I2juLihZ66HnQx/cy\n"
READY_S = 20.0


@dataclass
class Registry:
    """A registry that is started and stopped by its process id; its data outlive a restart."""

    program: str
    directory: Path
    host: str
    options: list[str] = field(default_factory=list)
    scheme: str = "http"
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers, for a bounded time."""
        config = self.directory / "config.json"  # JSON is YAML
        config.write_text(json.dumps(self.config()))
        own = {name: value for name, value in os.environ.items() if not name.startswith("REGISTRY_")}  # its overrides
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen([self.program, "serve", config], stdout=log, stderr=log, env=own)
        deadline_s = time.monotonic() + READY_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                self.stop()
                raise AssertionError("the registry did not start:\n" + (self.directory / "log").read_text()[-2000:])
            time.sleep(0.02)

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End its process, and no other."""
        if self.process and self.process.poll() is None:
            os.kill(self.process.pid, how)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)

    def config(self) -> dict[str, object]:
        """Return its configuration file."""
        http: dict[str, object] = {"addr": self.host}
        config: dict[str, object] = {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self.directory / "data")}, "delete": {"enabled": True}},
            "http": http,
        }
        if "login" in self.options:
            (self.directory / "htpasswd").write_text(_HTPASSWD)
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(self.directory / "htpasswd")}}
        if "tls" in self.options:
            http["tls"] = {"certificate": str(self.directory / "cert.pem"), "key": str(self.directory / "key.pem")}
        return config

    def blob(self, digest: str) -> Path:
        """Return the file in which it keeps a blob."""
        name = digest.removeprefix("sha256:")
        return self.directory / "data/docker/registry/v2/blobs/sha256" / name[:2] / name / "data"

    def empty_blobs(self) -> list[Path]:
        """Return the blobs that it was killed in writing: files with nothing in them, which it takes for stored."""
        kept = (self.directory / "data/docker/registry/v2/blobs").glob("sha256/*/*/data")
        return [path for path in kept if not path.stat().st_size]

    def _answers(self) -> bool:
        if "tls" in self.options:
            try:
                socket.create_connection(self.host.split(":"), 1).close()
            except OSError:
                return False
            return True
        try:
            with urllib.request.urlopen(f"http://{self.host}/v2/", timeout=1):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 401
        except OSError:
            return False


@contextmanager
def running_registry(program: str, directory: Path, *options: str) -> Iterator[Registry]:
    """Yield a registry; options: `login` wants USER and PASSWORD, `tls` takes cert.pem and key.pem in `directory`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    registry = Registry(program, directory, host, list(options))
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()
