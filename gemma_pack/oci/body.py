"""A blob and its bytes on their way to a registry: read once, hashed while they leave."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gemma_pack.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STOPPED: Final = "stopped, because another part of the transfer failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A blob that can be read as often as needed; `read` yields its bytes from the start."""

    size_bytes: int
    digest: str | None
    """None until somebody has read the blob."""
    read: Callable[[], Iterator[bytes]]
    label: str
    key: str
    """Under which the journal remembers its upload session: the digest, or what stands for the unread files."""


class CheckedBody:
    """A blob's bytes for one or many requests, hashed from the first on as they leave."""

    def __init__(self, blob: Blob, advance: Callable[[int], None], stop: Callable[[], bool] = lambda: False) -> None:
        """Prepare to read `blob`; `advance` is told how far along it is, `stop` ends reading early."""
        self.digest = blob.digest
        """Known, at the latest, when the last byte was read."""
        self._blob = blob
        self._advance = advance
        self._stop = stop
        self._counted = 0
        self._begin()

    def piece(self, start: int, size_bytes: int) -> Iterator[bytes]:
        """Yield `size_bytes` bytes from offset `start` on; those before are read again where they must be hashed.

        The last bytes of the blob leave only if its digest, where it is known, is right.

        Raises:
            RegistryError: the bytes are not those of the digest.
        """
        self._skip_to(start)
        self._count(start)
        end = start + size_bytes
        while self._position < end:
            piece = self._next(end - self._position)
            yield piece
            self._count(self._position)

    def whole_digest(self) -> str:
        """Return the digest, reading what was not read yet where that is needed to know it.

        Raises:
            RegistryError: the file changed meanwhile.
        """
        if self.digest is None:
            self._skip_to(self._blob.size_bytes)
        return self.digest or self._finish()

    def settle(self) -> None:
        """Count the whole blob as arrived."""
        self._count(self._blob.size_bytes)

    def _begin(self) -> None:
        self._pieces = self._blob.read()
        self._rest = b""
        self._position = 0
        self._hash = hashlib.sha256()

    def _skip_to(self, start: int) -> None:
        if start < self._position:
            self._begin()
        while self._position < start:
            self._next(start - self._position)

    def _next(self, at_most: int) -> bytes:
        if self._stop():
            raise RegistryError(STOPPED)
        fresh = self._rest or next(self._pieces, b"")
        piece, self._rest = (fresh, b"") if len(fresh) <= at_most else (fresh[:at_most], fresh[at_most:])
        self._hash.update(piece)
        self._position += len(piece)
        if not piece:
            raise self._changed()
        if self._position == self._blob.size_bytes:
            self._finish()
        return piece

    def _finish(self) -> str:
        """Compare the digest of all bytes with the one known, or keep it as that."""
        digest = f"sha256:{self._hash.hexdigest()}"
        if self.digest not in (None, digest):
            raise self._changed()
        self.digest = digest
        return digest

    def _changed(self) -> RegistryError:
        return RegistryError(
            f"{self._blob.label} has changed since its digest {self.digest or ''} was taken".replace("  ", " "),
            hint="run the command again when nothing writes to the directory; a layout is removed and packaged again",
        )

    def _count(self, position: int) -> None:
        self._advance(position - self._counted)
        self._counted = position
