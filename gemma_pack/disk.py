"""Writing that leaves nothing half-made: directories that appear whole, files that are replaced in one step.

What is written here has reached the disk before its name has, so that a machine that loses power leaves it
whole or not there, as an error or Ctrl-C does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma_pack.console import format_bytes
from gemma_pack.errors import InvalidUsageError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNUSABLE: Final = frozenset({errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS})


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target` when the block ends without an error.

    Files get mode 0644 and directories 0755, so that a server under another user can read them, and are on the disk
    before the name is: a machine that loses power leaves the target whole or not there, too. What killed processes
    left behind on their way to the same target is removed.

    Raises:
        InvalidUsageError: `target` exists already and is not an empty directory.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        _remove_abandoned(left)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    held = os.open(staging, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks, where nobody removes what is left behind
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield staging
        publish(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(held)


def _remove_abandoned(directory: Path) -> None:
    """Remove a directory unless a living process has locked it, or it is not ours to remove."""
    with contextlib.suppress(OSError):
        held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if any(directory.iterdir()):  # an empty one may be about to be locked, and takes no room
                shutil.rmtree(directory)
        finally:
            os.close(held)


@contextlib.contextmanager
def held_alone(target: Path) -> Iterator[None]:
    """Hold `target` against other processes of this user that would make it, until the block ends or the process does.

    Where the cache cannot be written to or has no locks, nobody is kept out.

    Raises:
        InvalidUsageError: another process holds it.
    """
    path = cache_directory() / "locks" / f"{hashlib.sha256(str(target.absolute()).encode()).hexdigest()[:16]}.made"
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(path.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidUsageError(
                f"another process is making {target}", hint="wait for it, or choose another directory with -o"
            ) from error
        except OSError:
            pass
        else:
            held.callback(path.unlink, missing_ok=True)
        yield


def publish(staging: Path, target: Path) -> None:
    """Turn the finished directory `staging` into `target`, beside it, readable by all and on the disk before its name.

    Raises:
        InvalidUsageError: `target` exists and is not an empty directory.
    """
    for path in (*staging.rglob("*"), staging):
        if not path.is_symlink():  # what a link points to is not ours
            path.chmod(0o755 if path.is_dir() else 0o644)
            _flush(path)
    try:
        staging.rename(target)
    except OSError:
        refuse_existing(target)  # another process put something there meanwhile
        raise
    _flush(target.parent)


def refuse_existing(target: Path) -> None:
    """Raise InvalidUsageError if `target` exists and is anything but an empty directory, or the one we are in.

    Also where it could not be made, see `require_makeable`.
    """
    empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if os.path.lexists(target) and (not empty or target.samefile(Path.cwd())):
        raise InvalidUsageError(f"{target} is in the way", hint="choose another directory with -o, or remove it first")
    require_makeable(target)


def require_makeable(target: Path, *, option: str = "-o") -> None:
    """Raise InvalidUsageError if `target` is to lie below a file, or in a directory that may not be written to.

    `option` is what the user can choose another place with.
    """
    above = next(place for place in target.absolute().parents if os.path.lexists(place))
    if not above.is_dir():
        raise InvalidUsageError(
            f"{target} cannot be made: {above} is a file", hint=f"choose another place with {option}"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise InvalidUsageError(
            f"{target} cannot be made: you may not write to {above}", hint=f"choose another place with {option}"
        )


def cache_directory() -> Path:
    """Return where what was fetched is kept: $GEMMA_PACK_CACHE, else gemma-pack in the user's cache."""
    if configured := os.environ.get("GEMMA_PACK_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-pack"


def cache_error(error: BaseException) -> MachineError | None:
    """Return the error for a cache that may not be made, read or written to, if `error` is about it."""
    if not isinstance(error, OSError) or error.errno not in _UNUSABLE or not isinstance(error.filename, str):
        return None
    try:
        cache, path = cache_directory().absolute(), Path(error.filename).absolute()
    except RuntimeError:  # nobody's home
        return None
    if not path.is_relative_to(cache) and not cache.is_relative_to(path):
        return None
    return MachineError(
        f"the cache cannot be used: {error.strerror or error} at {path}",
        hint="GEMMA_PACK_CACHE names another directory for it",
    )


def is_ours(path: Path) -> bool:
    """Tell whether `path` belongs to whom a file made beside it now belongs to; a link never does.

    In a directory that all may write to, as /tmp, somebody else may have put there what looks like ours. Not the
    user's number is asked for: a disk on the network may give files any owner.
    """
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        return not path.is_symlink() and path.stat().st_uid == os.fstat(probe.fileno()).st_uid


def require_space(target: Path, size_bytes: int) -> None:
    """Raise MachineError unless the disk that will hold `target` has `size_bytes` free."""
    existing = next(place for place in (target, *target.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < size_bytes:
        raise MachineError(
            f"{target} needs {format_bytes(size_bytes)} and the disk has {format_bytes(free)} free",
            hint="free some space, or choose a directory on another disk",
        )


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by a file that holds `data`, in one step, mode 0644, on the disk before the name is."""
    encoded = data.encode() if isinstance(data, str) else data
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(encoded)
            stream.flush()
            os.fsync(descriptor)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_output(path: Path, text: str) -> None:
    """Write `text` to what the user named for output, as `write_atomic` does; with no text, take away what is there.

    A link, a device or a pipe is written to and stays what it is. What stdout or stderr already goes to, as /dev/stdout
    does, gets a line more, in its turn.
    """
    own = _own_stream(path)
    if own is not None:
        os.write(own, f"{text}\n".encode() if text else b"")
        return
    replaceable = not os.path.lexists(path) or (path.is_file() and not path.is_symlink())
    if replaceable and text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    elif replaceable:
        path.unlink(missing_ok=True)
    elif text or path.is_file():  # opening a pipe and writing nothing would tell its reader that this was all
        path.write_text(text, "utf-8")


def _own_stream(path: Path) -> int | None:
    """Return the descriptor of stdout or stderr where it goes to `path`."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # there is nothing at `path`, or no such stream
            if os.path.samestat(path.stat(), os.fstat(stream)):
                return stream
    return None


def _flush(path: Path) -> None:
    """Wait until what was written to a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
