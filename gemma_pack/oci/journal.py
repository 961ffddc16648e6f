"""What a push remembers on disk, so that the same command goes on where a killed one was.

    .NAME.push.jsonl      beside the source NAME, private; one JSON array a line, added as things happen

    ["digest", FILES, DIGEST]              a layer's digest, so that its files are not read again to learn it
    ["session", REPOSITORY, KEY, URL]      where an upload goes on; an empty URL: it ended

FILES stands for the files of a layer by name, size, times and inode, as git's index and make know a file that did not
change. Nothing here is trusted further than that: a wrong digest is refused by the registry, and every blob is asked
for again when the push ends. A line that a crash tore is passed over; a directory that cannot be written to is pushed
without a journal, and so is one beside which another user put one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

from gemma_pack.disk import is_ours

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma_pack.oci.layers import Layer

MAX_JOURNAL_BYTES: Final = 4 << 20
"""A journal that has grown past this is begun anew."""
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


class PushJournal:
    """Digests of layers, and upload sessions in one repository. Threads may share it."""

    def __init__(self, repository: str, stream: IO[bytes] | None = None) -> None:
        """Read what `stream`, which this process alone holds, remembers; without one, nothing outlives the process.

        Args:
            repository: with its host; sessions of others are kept, and not offered.
            stream: open for reading and appending.
        """
        self._repository = repository
        self._stream = stream
        self._lock = threading.Lock()
        self._digests: dict[str, str] = {}
        self._sessions: dict[tuple[str, str], str] = {}
        self._load()

    @classmethod
    @contextmanager
    def beside(cls, source: Path, repository: str) -> Iterator[Self]:
        """Yield the journal of a source, or one in memory where another push holds it or it cannot be written."""
        path = journal_path(source)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            yield cls(repository)
            return
        with os.fdopen(descriptor, "r+b", buffering=0) as stream:
            if not is_ours(path):  # digests in it are taken on trust, and sessions say where the bytes go
                yield cls(repository)
                return
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another push of this source is under way, and its sessions are its own
                yield cls(repository)
                return
            journal = cls(repository, stream)
            yield journal
            if not journal._digests and not journal._sessions:  # nothing worth keeping
                path.unlink(missing_ok=True)

    def digest(self, files: str) -> str | None:
        """Return the digest of a layer whose files are those of the fingerprint `files`."""
        return self._digests.get(files)

    def keep_digest(self, files: str, digest: str) -> None:
        """Remember the digest of a layer."""
        if self._digests.get(files) != digest:
            self._digests[files] = digest
            self._add("digest", files, digest)

    def session(self, key: str) -> str | None:
        """Return the URL of the session through which the blob `key` was going."""
        return self._sessions.get((self._repository, key))

    def keep_session(self, key: str, url: str) -> None:
        """Remember where the upload of `key` goes on; an empty URL forgets it."""
        place = (self._repository, key)
        if url == self._sessions.get(place, ""):
            return
        self._sessions[place] = url
        if not url:
            del self._sessions[place]
        self._add("session", self._repository, key, url)

    def _load(self) -> None:
        if not self._stream:
            return
        data = self._stream.read(MAX_JOURNAL_BYTES + 1)
        if len(data) > MAX_JOURNAL_BYTES:
            self._stream.truncate(0)
            return
        for line in data.splitlines():
            with suppress(ValueError, RecursionError):
                self._take(json.loads(line))
        if data and not data.endswith(b"\n"):
            self._write(b"\n")

    def _take(self, line: object) -> None:
        match line:
            case ["digest", str(files), str(digest)] if _DIGEST.fullmatch(digest):
                self._digests[files] = digest
            case ["session", str(repository), str(key), ""]:
                self._sessions.pop((repository, key), None)
            case ["session", str(repository), str(key), str(url)]:
                self._sessions[repository, key] = url
            case _:
                pass

    def _add(self, *line: str) -> None:
        self._write(json.dumps(line).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        """Append in one write; a full disk costs the next push some time, and this one nothing."""
        if self._stream:
            with self._lock, suppress(OSError):
                self._stream.write(data)


def journal_path(source: Path) -> Path:
    """Return where the journal of a source lies."""
    place = Path(os.path.abspath(source))  # noqa: PTH100 - resolve() follows a link, which has a name of its own
    return place.with_name(f".{place.name}.push.jsonl")


def fingerprint(layer: Layer) -> str:
    """Return what stands for the files of a layer: another text as soon as one of them is written to or replaced."""
    state = hashlib.sha256()
    for entry in layer.files:
        if entry.source:
            found = entry.source.stat()
            marks = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
            state.update(json.dumps([entry.name, *marks]).encode())
    return f"{layer.media_type} {layer.title} {state.hexdigest()}"
