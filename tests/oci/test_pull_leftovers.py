"""What a pull leaves beside its target, where it was killed late or the file system is not a local one."""

from __future__ import annotations

import errno
import fcntl
import gzip
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gemma_pack.errors import RegistryError
from gemma_pack.oci.manifest import GZIP_LAYER_TYPE, sha256_digest
from gemma_pack.oci.pull import pull
from gemma_pack.oci.push import push
from tests.oci.faulty import Fault, Faulty, Handler, cut_download, quick
from tests.oci.test_pull import MIB, QUIET, checkpoint_tar, contents, image, leftovers, pushed, target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["image", "pushed", "target"]  # fixtures

DYING = """
import os, signal, sys
from gemma_pack.oci import pull as module
right = getattr(module, sys.argv[1])
def deadly(*arguments):
    right(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(module, sys.argv[1], deadly)
from gemma_pack.commands import run
sys.exit(run(sys.argv[2:]))
"""


def pull_and_die_after(function: str, reference: str, target: Path) -> None:
    """Pull in a process that kills itself as soon as `function` of the module returns."""
    command = [sys.executable, "-c", DYING, function, "pull", reference, "-o", str(target)]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == -signal.SIGKILL


def push_other(reference: str, directory: Path, copy: Path) -> str:
    """Push a checkpoint that differs from the one in `directory` in its weights alone; return its reference."""
    shutil.copytree(directory, copy)
    for shard in copy.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    other = f"{reference.rpartition(':')[0]}:2"
    push(copy, other, reporter=QUIET)
    return other


@pytest.mark.parametrize("function", ["publish", "_remove", "_overlay"])
@pytest.mark.parametrize("which", ["same", "other"])
def test_layers_whose_files_were_moved_are_not_taken_for_whole(
    pushed: str, target: Path, tmp_path: Path, function: str, which: str
):
    reference = push_other(pushed, tmp_path / "model", tmp_path / "copy") if which == "other" else pushed
    pull_and_die_after(function, pushed, target)
    shutil.rmtree(target, ignore_errors=True)
    pull(reference, target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / ("copy" if which == "other" else "model"))
    assert leftovers(target) == [".gemma.pulled.json"]


def test_a_removal_that_was_killed_halfway_is_no_trap(pushed: str, target: Path, tmp_path: Path):
    other = push_other(pushed, tmp_path / "model", tmp_path / "copy")
    pull_and_die_after("publish", pushed, target)
    shutil.rmtree(target)
    staging = target.with_name(f".{target.name}.pull")
    largest = sorted(path for path in staging.iterdir() if path.is_dir())[:2]  # any two layers are gone already
    for path in largest:
        shutil.rmtree(path)
    pull(other, target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / "copy")


def test_an_open_file_that_keeps_its_name_is_no_obstacle(
    pushed: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on NFS, where a file that is removed while it is open gets another name until it is closed."""
    unlink = os.unlink

    def rename(path: str | Path, *, dir_fd: int | None = None) -> None:
        if str(path).endswith("lock"):
            os.rename(path, f"{path}.nfs", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", rename)
    pull(pushed, target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")


def test_a_file_system_without_locks_is_pulled_to(
    pushed: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    pull(pushed, target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")


def kept_bytes(target: Path) -> int:
    staging = target.with_name(f".{target.name}.pull")
    return sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())


def test_what_came_outlives_a_registry_that_speaks_nonsense_for_a_moment(
    faulty: Faulty, pushed: str, target: Path, tmp_path: Path
):
    faulty.faults = [Fault("GET", "/blobs/", cut_download(MIB), times=99)]
    with pytest.raises(RegistryError):
        pull(pushed, target, retry=quick(1), reporter=QUIET)
    kept = kept_bytes(target)
    assert kept > MIB // 2
    faulty.faults = [Fault("GET", "/blobs/", lambda request: request.answer(302, {"Location": ""}), times=99)]
    with pytest.raises(RegistryError, match="no usable Location"):
        pull(pushed, target, retry=quick(1), reporter=QUIET)
    assert kept_bytes(target) == kept
    faulty.faults = []
    assert pull(pushed, target, reporter=QUIET).resumed_bytes > MIB // 2
    assert contents(target) == contents(tmp_path / "model")


def damage(data: bytes, place: int) -> Callable[[Handler], None]:
    """Answer with `data`, one bit of it flipped."""
    damaged = bytearray(data)
    damaged[place] ^= 1
    return lambda request: request.answer(200, {}, bytes(damaged))


@pytest.mark.parametrize("place", [0, 150, 5000])
def test_a_layer_damaged_on_the_way_is_fetched_again_wherever_it_was(
    faulty: Faulty, pushed: str, target: Path, tmp_path: Path, place: int
):
    (_, digest), data = max(faulty.blobs.items(), key=lambda item: len(item[1]))
    faulty.faults = [Fault("GET", f"/blobs/{digest}", damage(data, place))]
    pull(pushed, target, retry=quick(), reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")


def test_a_gzipped_layer_damaged_on_the_way_is_fetched_again(
    faulty: Faulty, image: Callable[..., Path], random_checkpoint: Callable[..., Path], target: Path, tmp_path: Path
):
    data = gzip.compress(checkpoint_tar(random_checkpoint(size_bytes=MIB)))
    reference = f"{faulty.host}/team/zipped:1"
    push(image([(data, GZIP_LAYER_TYPE)]), reference, reporter=QUIET)
    fault = Fault("GET", f"/blobs/{sha256_digest(data)}", damage(data, len(data) // 2))
    faulty.faults = [fault]
    pull(reference, target, retry=quick(), reporter=QUIET)
    assert fault.times == 0
    assert contents(target) == contents(tmp_path / "model")
