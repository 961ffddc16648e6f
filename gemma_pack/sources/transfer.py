"""Resumable download of a hub snapshot's files, each checked against the digest that the hub names.

The bytes are fetched here because huggingface_hub, since it stopped sharing partial files between processes
(its pull request 4228), throws an interrupted file away: of an 18 GB model that can be 5 GB. Here a file grows under
its own name in a directory that nobody takes for a checkpoint, and a later run continues at its last byte.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import httpx
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # documented there, not in __all__

from gemma_pack.console import format_bytes
from gemma_pack.errors import SourceError
from gemma_pack.safetensors_file import READ_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gemma_pack.console import Reporter

_PARALLEL_FILES: Final = 4
_ATTEMPTS: Final = 5
"""In a row without a new byte."""
_PAUSE_S: Final = 1.0
"""Before the second attempt; doubled before each further one."""
_TIMEOUT: Final = httpx.Timeout(30.0, connect=10.0)
_TRANSIENT_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file of a snapshot, and the digest that the hub knows it by."""

    path: str
    url: str
    """Empty where the hub was not asked, and only `cached` can give the bytes."""
    size_bytes: int
    algorithm: Literal["sha256", "git-blob-sha1"]
    """sha256 for a file in large-file storage, git's object id for one in the repository itself."""
    digest: str
    """In hex."""
    cached: Path | None = None
    """Where huggingface_hub's cache has it."""

    def matches(self, path: Path) -> bool:
        """Tell whether the file at `path` has the size and the digest."""
        if path.stat().st_size != self.size_bytes:
            return False
        state = (
            hashlib.sha256()
            if self.algorithm == "sha256"
            else hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
        )
        with path.open("rb") as stream:
            while piece := stream.read(READ_BYTES):
                state.update(piece)
        return state.hexdigest() == self.digest


def fetch_files(
    files: Sequence[RemoteFile],
    directory: Path,
    *,
    label: str,
    headers: dict[str, str],
    client: httpx.Client,
    reporter: Reporter,
) -> None:
    """Bring all `files` into `directory`, several at a time, going on where an earlier run stopped.

    Raises:
        SourceError: a file does not match its digest, and was deleted; or the connection broke for good, and what
            had come is kept.
    """
    stop = threading.Event()
    lock = threading.Lock()
    total = sum(file.size_bytes for file in files)
    with reporter.progress(label, total, "bytes") as task, ThreadPoolExecutor(_PARALLEL_FILES) as pool:

        def advance(size_bytes: int) -> None:
            with lock:
                task.advance(size_bytes)

        transfers = [_Transfer(file, directory / file.path, headers, client, advance, stop) for file in files]
        futures = [pool.submit(transfer.run) for transfer in transfers]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()  # the other threads end at their next piece, so that Ctrl-C does not wait for gigabytes
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _StoppedError(Exception):
    """Another file failed, or the user interrupted."""


class _BusyError(Exception):
    """The hub answered with a status that passes."""


@dataclass(slots=True)
class _Transfer:
    """One file on its way to `path`."""

    file: RemoteFile
    path: Path
    headers: dict[str, str]
    client: httpx.Client
    advance: Callable[[int], None]
    stop: threading.Event

    def run(self) -> None:
        """Fetch what is missing of the file and check all of it."""
        size = self.file.size_bytes
        if self._take_from_cache():
            self.advance(size)
            return
        if self._present() > size:
            self.path.unlink()
        self.advance(self._present())
        failures, most = 0, self._present()
        while (begin := self._present()) < size:
            try:
                self._stream(begin)
            except (httpx.TransportError, _BusyError) as error:
                failures = 1 if self._present() > most else failures + 1
                most = max(most, self._present())
                if failures >= _ATTEMPTS:
                    raise SourceError(
                        f"the connection broke at {format_bytes(self._present())} of {self.file.path}, which has "
                        f"{format_bytes(size)}: {error}",
                        hint="run the same command again: it goes on where it stopped",
                    ) from error
                self.stop.wait(_PAUSE_S * 2 ** (failures - 1))
        if size == 0:
            self.path.touch()
        if not self.file.matches(self.path):
            self.path.unlink()
            raise SourceError(
                f"{self.file.path} does not match the {self.file.algorithm} that the hub names, and was deleted",
                hint="run the same command again; if it happens again, a proxy or the disk alters the bytes",
            )

    def _take_from_cache(self) -> bool:
        """Link, or copy from another disk, what huggingface_hub has fetched before, if it is undamaged."""
        cached = self.file.cached
        if cached is None or self._present() == self.file.size_bytes:
            return False
        if not self.file.matches(cached):
            if not self.file.url:
                raise SourceError(
                    f"{self.file.path} in huggingface_hub's cache is damaged: {cached}",
                    hint="run the same command with the network",
                )
            return False
        self.path.unlink(missing_ok=True)
        try:
            if cached.stat().st_uid != os.getuid():
                raise PermissionError  # in a cache shared between users: a link could not be made readable for all
            os.link(cached.resolve(), self.path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(cached, self.path)
        return True

    def _present(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _stream(self, begin: int) -> None:
        """Append to the file from byte `begin` on, or start it over where the server does not do ranges."""
        headers = self.headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begin}-"} if begin else {})
        with self.client.stream(
            "GET", self.file.url, headers=headers, follow_redirects=True, timeout=_TIMEOUT
        ) as response:
            if response.status_code in _TRANSIENT_STATUS:
                raise _BusyError(f"the hub answered {response.status_code}")
            hf_raise_for_status(response)
            resumes = response.status_code == httpx.codes.PARTIAL_CONTENT
            if not resumes:
                self.advance(-begin)
                begin = 0
            with self.path.open("ab" if resumes else "wb", buffering=0) as stream:
                for piece in response.iter_bytes():
                    if self.stop.is_set():
                        raise _StoppedError
                    stream.write(piece)
                    self.advance(len(piece))
                    begin += len(piece)
                    if begin > self.file.size_bytes:
                        break  # not the file; the digest will say so
