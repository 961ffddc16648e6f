"""Nothing half-made is ever left where it looks whole: not by an error, not by a full disk, not by Ctrl-C."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gemma_pack import disk
from gemma_pack.disk import (
    cache_error,
    held_alone,
    is_ours,
    refuse_existing,
    require_space,
    staged_directory,
    write_atomic,
)
from gemma_pack.errors import InvalidUsageError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def _careful_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.usefixtures("_careful_umask")
def test_a_directory_appears_when_its_block_ends_and_others_can_read_it(tmp_path: Path):
    target = tmp_path / "new" / "model"
    with staged_directory(target) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("1", "utf-8")
        assert not target.exists()
        assert staging.parent == target.parent, "a rename must not cross disks"
    assert (target / "sub" / "file").read_text("utf-8") == "1"
    assert (mode(target), mode(target / "sub"), mode(target / "sub" / "file")) == (0o755, 0o755, 0o644)
    assert entries(target.parent) == ["model"]


@pytest.mark.usefixtures("_careful_umask")
def test_what_a_link_points_to_keeps_its_mode(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("1", "utf-8")
    with staged_directory(tmp_path / "model") as staging:
        (staging / "link").symlink_to(secret)
        (staging / "dangling").symlink_to("nowhere")
    assert mode(secret) == 0o600
    assert entries(tmp_path / "model") == ["dangling", "link"]


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_directory_that_was_not_finished_is_not_there(tmp_path: Path, error: BaseException):
    with pytest.raises(type(error)), staged_directory(tmp_path / "model") as staging:  # noqa: PT012 - what is tested
        (staging / "half").write_text("1", "utf-8")
        raise error
    assert entries(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path):
    script = """
import sys, time
from pathlib import Path
from gemma_pack.disk import staged_directory
with staged_directory(Path(sys.argv[1])) as staging:
    (staging / "half").write_text("1", "utf-8")
    print(staging.name, flush=True)
    time.sleep(60)
"""
    target = tmp_path / "[model]"
    command = [sys.executable, "-c", script, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = process.stdout.readline().strip()
        with staged_directory(target):
            pass
        target.rmdir()
        assert entries(tmp_path) == [left]
        process.kill()
    with staged_directory(target):
        assert left not in entries(tmp_path)
    assert entries(tmp_path) == ["[model]"]


def test_only_one_makes_a_directory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path / "cache"))
    with held_alone(tmp_path / "a"), held_alone(tmp_path / "b"):
        with pytest.raises(InvalidUsageError, match="another process") as caught, held_alone(tmp_path / "a"):
            pass
        assert caught.value.hint is not None
        assert "-o" in caught.value.hint
    with held_alone(tmp_path / "a"):
        pass
    assert entries(tmp_path / "cache" / "locks") == []


def test_without_a_cache_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path / "file"))
    with held_alone(tmp_path / "a"), held_alone(tmp_path / "a"):
        pass


def test_a_disk_that_fills_up_while_files_are_flushed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(descriptor))

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), staged_directory(tmp_path / "model") as staging:
        (staging / "file").write_text("1", "utf-8")
    assert entries(tmp_path) == []


def test_all_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "model"
    flushed: list[tuple[int, bool]] = []

    def record(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, target.exists()))

    monkeypatch.setattr(disk.os, "fsync", record)
    with staged_directory(target) as staging:
        (staging / "file").write_text("1", "utf-8")
    file, directory, above = (path.stat().st_ino for path in (target / "file", target, tmp_path))
    assert flushed == [(file, False), (directory, False), (above, True)]


@pytest.mark.parametrize("kind", ["file", "full directory", "link to an empty directory", "dangling link"])
def test_what_is_in_the_way_stays_as_it_is(tmp_path: Path, kind: str):
    target = tmp_path / "model"
    if kind == "file":
        target.write_text("1", "utf-8")
    elif kind == "full directory":
        target.mkdir()
        (target / "file").write_text("1", "utf-8")
    else:
        if kind == "link to an empty directory":
            (tmp_path / "empty").mkdir()
        target.symlink_to(tmp_path / "empty")
    before = entries(tmp_path)
    with pytest.raises(InvalidUsageError, match="is in the way") as caught, staged_directory(target):
        pytest.fail("the block must not run")
    assert caught.value.hint == "choose another directory with -o, or remove it first"
    assert entries(tmp_path) == before


def test_an_empty_directory_is_filled(tmp_path: Path):
    (tmp_path / "model").mkdir()
    with staged_directory(tmp_path / "model") as staging:
        (staging / "file").write_text("1", "utf-8")
    assert entries(tmp_path / "model") == ["file"]


def test_the_directory_we_are_in_is_not_replaced_under_our_feet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidUsageError, match="is in the way"):
        refuse_existing(Path())


def test_what_another_process_put_there_meanwhile_wins(tmp_path: Path):
    target = tmp_path / "model"
    with pytest.raises(InvalidUsageError, match="is in the way"), staged_directory(target) as staging:  # noqa: PT012 - what is tested
        (staging / "file").write_text("ours", "utf-8")
        target.mkdir()
        (target / "file").write_text("theirs", "utf-8")
    assert (target / "file").read_text("utf-8") == "theirs"
    assert entries(tmp_path) == ["model"]


@pytest.mark.usefixtures("_careful_umask")
@pytest.mark.parametrize("data", ["ä\n", "ä\n".encode()])
def test_a_file_is_replaced_in_one_step(tmp_path: Path, data: bytes | str):
    path = tmp_path / "record.json"
    path.write_text("old", "utf-8")
    write_atomic(path, data)
    assert path.read_bytes() == b"\xc3\xa4\n"
    assert mode(path) == 0o644
    assert entries(tmp_path) == ["record.json"]


def test_a_file_whose_replacement_fails_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(descriptor))

    path = tmp_path / "record.json"
    path.write_text("old", "utf-8")
    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text("utf-8") == "old"
    assert entries(tmp_path) == ["record.json"]


def test_a_disk_too_small_is_said_before_the_work(tmp_path: Path):
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(MachineError, match=r"needs 1000000000\.00 GB and the disk has .* free") as caught:
        require_space(tmp_path / "not" / "there" / "yet", 10**18)
    assert caught.value.hint


def test_a_file_is_ours_by_its_owner_and_a_link_never_is(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert is_ours(tmp_path / "file")
    assert not is_ours(tmp_path / "link")
    if os.geteuid() == 0:
        os.chown(tmp_path / "file", 4242, 4242)
        assert not is_ours(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "number", "known"),
    [
        ("cache/demo/config.json", errno.EACCES, True),
        ("cache", errno.EROFS, True),
        (".", errno.EACCES, True),  # where the cache would have to be made
        ("cache/demo", errno.EISDIR, False),
        ("model", errno.EACCES, False),
    ],
)
def test_a_cache_that_cannot_be_used_is_told_from_other_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, *, known: bool
) -> None:
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path / "cache"))
    error = cache_error(OSError(number, os.strerror(number), str(tmp_path / name)))
    assert (error is not None) is known
    if error:
        assert (error.exit_code, "GEMMA_PACK_CACHE" in (error.hint or "")) == (12, True)
    assert cache_error(ValueError(name)) is None
