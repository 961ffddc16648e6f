"""`kill -9` of the client and of the registry at any moment: the same command makes the image whole."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import IO, TYPE_CHECKING, Any

import pytest

from gemma_pack.oci.journal import journal_path
from gemma_pack.oci.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.oci.registry import Registry

MIB = 1 << 20
CLIENT_KILLS, REGISTRY_KILLS = 10, 5
WAIT_S = 60.0

# Forks a process for each command, so that a push begins at once and not with half a second of imports.
_NURSERY = """
import os, sys
import gemma_pack.oci.push
from gemma_pack.commands import run
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os._exit(run(line.rstrip("\\n").split("\\t")))
    print(pid, flush=True)
    sys.stdin.readline()  # until then the process id is nobody else's
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Nursery:
    """Starts gemma-pack commands, one at a time."""

    commands: IO[str]
    answers: IO[str]

    def start(self, *arguments: object) -> int:
        """Begin a command and return its process id; `finish` must follow."""
        self.commands.write("\t".join(map(str, arguments)) + "\n")
        self.commands.flush()
        return int(self.answers.readline())

    def finish(self) -> int:
        """Wait for the command and return its exit code, negative for a signal."""
        self.commands.write("\n")
        self.commands.flush()
        return int(self.answers.readline())

    def run(self, *arguments: object) -> int:
        """Run a command to its end."""
        self.start(*arguments)
        return self.finish()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with _nursery() as running:
        yield running


@contextmanager
def _nursery() -> Iterator[Nursery]:
    with subprocess.Popen(
        [sys.executable, "-c", _NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        try:
            yield Nursery(process.stdin, process.stdout)
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def fetch(host: str, path: str) -> bytes | None:
    """Ask the registry with nothing of ours."""
    connection = HTTPConnection(host, timeout=WAIT_S)
    accept = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json"
    with closing(connection):
        connection.request("GET", f"/v2/{path}", headers={"Accept": accept})
        answer = connection.getresponse()
        data = answer.read()
        assert answer.status in (200, 404, 500)  # 500 to a tag whose writing a kill has cut short: no image, either
        return data if answer.status == 200 else None


def tagged(host: str, repository: str) -> str | None:
    """Return the digest behind the tag 1 if there is one; whatever it names must be whole, byte by byte."""

    def checked(kind: str, digest: str) -> bytes:
        data = fetch(host, f"{repository}/{kind}/{digest}")
        assert data is not None
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == digest
        return data

    root = fetch(host, f"{repository}/manifests/1")
    if root is None:
        return None
    for entry in json.loads(root)["manifests"]:
        manifest: dict[str, Any] = json.loads(checked("manifests", entry["digest"]))
        for blob in (manifest["config"], *manifest["layers"]):
            checked("blobs", blob["digest"])
    return f"sha256:{hashlib.sha256(root).hexdigest()}"


def seconds_of_a_push(nursery: Nursery, source: Path, registry: Registry) -> float:
    """Return how long an undisturbed push takes, the first one of all aside."""
    for name in ("first", "second"):
        begin_s = time.monotonic()
        assert nursery.run("push", source, f"{registry.host}/team/{name}:1", "--quiet") == 0
        journal_path(source).unlink(missing_ok=True)
    return time.monotonic() - begin_s


@pytest.mark.parametrize("kind", ["directory", "layout"])
def test_a_client_killed_at_ten_moments_leaves_what_the_same_command_finishes(
    registry: Registry, random_layout: Callable[..., Path], nursery: Nursery, tmp_path: Path, kind: str
):
    layout = random_layout(shards=3, size_bytes=4 * MIB)
    source = tmp_path / "model" if kind == "directory" else layout
    digest = Layout.open(layout).root.digest
    whole_s = seconds_of_a_push(nursery, source, registry)
    moments = random.Random(f"kill the client {kind}")  # noqa: S311 - any moments do, the same ones each time
    killed = 0
    for number in range(CLIENT_KILLS):
        repository = f"team/gemma{number}"
        command = ("push", source, f"{registry.host}/{repository}:1", "--quiet")
        journal_path(source).unlink(missing_ok=True)
        process = nursery.start(*command)
        time.sleep(moments.uniform(0, 0.9 * whole_s))
        os.kill(process, signal.SIGKILL)
        if nursery.finish() == -signal.SIGKILL:
            killed += 1
        else:
            whole_s *= 0.7  # the machine was busier when the whole push was timed
        assert tagged(registry.host, repository) in (None, digest)
        assert nursery.run(*command) == 0
        assert tagged(registry.host, repository) == digest
    assert killed >= CLIENT_KILLS // 2


def test_a_registry_killed_at_five_moments_has_the_image_in_the_end(
    registry: Registry, random_layout: Callable[..., Path], nursery: Nursery, tmp_path: Path
):
    digest = Layout.open(random_layout(shards=3, size_bytes=4 * MIB)).root.digest
    moments = random.Random("kill the registry")  # noqa: S311 - the same moments each time
    whole_s = seconds_of_a_push(nursery, tmp_path / "model", registry)
    for number in range(REGISTRY_KILLS):
        repository = f"team/gemma{number}"
        command = ("push", tmp_path / "model", f"{registry.host}/{repository}:1", "--quiet")
        nursery.start(*command)
        time.sleep(moments.uniform(0, 0.9 * whole_s))
        registry.stop(signal.SIGKILL)
        registry.start()
        code = nursery.finish()
        assert code in (0, 1, 14)  # it waited long enough; or an error said so, and nothing looks whole
        assert tagged(registry.host, repository) in (None, digest)
        if damaged := registry.empty_blobs():  # no push can mend these: see test_damaged_storage
            assert nursery.run(*command) == 1
            for path in damaged:  # as the hint says
                path.unlink()
        assert nursery.run(*command) == 0
        assert tagged(registry.host, repository) == digest


def test_what_a_killed_push_finished_is_neither_read_nor_sent_again(
    registry: Registry, random_layout: Callable[..., Path], tmp_path: Path
):
    random_layout(shards=3, size_bytes=4 * MIB)
    command = ["push", str(tmp_path / "model"), f"{registry.host}/team/gemma:1", "--format", "json"]
    deadly = """
import os, signal, sys
import gemma_pack.oci.push as module
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
module._tag = kill
from gemma_pack.commands import run
sys.exit(run(sys.argv[1:]))
"""
    counting = """
import sys
import gemma_pack.oci.layers as layers
read, total = layers.read_file, [0]
def counted(*arguments):
    for piece in read(*arguments):
        total[0] += len(piece)
        yield piece
layers.read_file = counted
from gemma_pack.commands import run
code = run(sys.argv[1:])
print(total[0], file=sys.stderr)
sys.exit(code)
"""
    ended = subprocess.run([sys.executable, "-c", deadly, *command], capture_output=True, check=False, timeout=WAIT_S)
    assert ended.returncode == -signal.SIGKILL
    assert tagged(registry.host, "team/gemma") is None
    again = subprocess.run([sys.executable, "-c", counting, *command], capture_output=True, check=True, timeout=WAIT_S)
    assert json.loads(again.stdout)["uploaded_bytes"] < 10_000  # the index's configurations came before the kill
    assert int(again.stderr.split()[-1]) == 0
