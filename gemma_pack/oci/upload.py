"""The way of one blob into a registry: exists, mounted, or sent, whatever the registry and the network do on the way.

Three ways to send, tried in this order unless the host is known to want another:

    stream      one PATCH with the whole blob, a closing PUT. Nothing to route between several servers.
    monolithic  one PUT with the whole blob, for registries that refuse PATCH or take only small ones.
    chunked     PATCH after PATCH with Content-Range, for proxies that cap a request, and after a stream broke:
                then it goes on where the registry says that it stopped.

The bytes are hashed again while they leave, and the last piece leaves only if the digest is right.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from gemma_pack.errors import AccessError, RegistryError
from gemma_pack.oci.auth import login_error
from gemma_pack.oci.retry import AnswerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gemma_pack.oci.client import RegistryClient, Upload
    from gemma_pack.oci.manifest import Descriptor

Mode = Literal["stream", "monolithic", "chunked"]
Outcome = Literal["uploaded", "existed", "mounted"]

CHUNK_BYTES: Final = 64 << 20
PROGRESS_BYTES: Final = 1 << 20
"""A try that got the registry this much further does not use up patience."""

_MONOLITHIC_HOSTS: Final = re.compile(
    r"ghcr\.io"  # 416 to chunks over 4 MiB
    r"|(.+\.)?gcr\.io|.+\.pkg\.dev"  # Google's take no chunks
    r"|.+\.dkr\.ecr[.-].+\.amazonaws\.com(\.cn)?|public\.ecr\.aws"  # ECR's sessions need parts of its own sizes
)
_STOPPED: Final = "stopped, because another part of the transfer failed"
_OTHER_MODES: Final[dict[int, tuple[Mode, ...]]] = {
    **dict.fromkeys((400, 405, 411, 415, 416, 501), ("monolithic", "chunked")),
    413: ("chunked",),
}
"""What to try when a request with a blob's bytes is refused as such."""
_NEW_SESSION: Final = frozenset({401, 404, 416})
"""Answers that a new token or a new session may change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A blob that can be read as often as needed; `read` yields its bytes from the start."""

    descriptor: Descriptor
    read: Callable[[], Iterator[bytes]]
    label: str


class Uploader:
    """Brings blobs into one repository; what it learns about the registry serves the next blob."""

    def __init__(
        self,
        client: RegistryClient,
        *,
        mount_from: Sequence[str] = (),
        advance: Callable[[int], None] = lambda _: None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Prepare to upload through `client`.

        Args:
            client: writes to the repository.
            mount_from: repositories of the same registry that may have the blobs already.
            advance: told of bytes that arrived, negative where some must be sent again.
            chunk_bytes: size of a chunk in chunked mode.
        """
        self._client = client
        self._mount_from = mount_from
        self._advance = advance
        self._chunk_bytes = chunk_bytes
        host = client.reference.api_host
        self.mode: Mode = "monolithic" if _MONOLITHIC_HOSTS.fullmatch(host) else "stream"

    def bring(self, blob: Blob) -> Outcome:
        """Make sure that the repository has `blob`.

        Raises:
            RegistryError: the registry refuses it, or its bytes changed since the digest was taken.
            AccessError: the login does not allow it.
        """
        if self._exists(blob):
            self._advance(blob.descriptor.size_bytes)
            return "existed"
        session = self._mount(blob)
        if session == "mounted":
            self._advance(blob.descriptor.size_bytes)
            return "mounted"
        _Sending(self, self._client, blob, self._advance, self._chunk_bytes).run(session)
        return "uploaded"

    def until_stopped(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on `pieces` until another part of the transfer fails.

        Raises:
            RegistryError: it did; that error, not this one, is the one to show.
        """
        for piece in pieces:
            if self._client.patience.stop.is_set():
                raise RegistryError(_STOPPED)
            yield piece

    def _exists(self, blob: Blob) -> bool:
        return self._client.blob_size(blob.descriptor.digest) == blob.descriptor.size_bytes

    def _mount(self, blob: Blob) -> Upload | Literal["mounted"] | None:
        session: Upload | None = None
        for source in self._mount_from:
            if session:
                self._client.cancel(session)
            try:
                session = self._client.mount(blob.descriptor.digest, source)
            except AccessError:  # no right to read there; that is no obstacle to uploading here
                session = None
                continue
            if session is None:
                return "mounted"
        return session


class _Sending:
    """One blob on its way: the mode, the session and the patience left."""

    def __init__(
        self,
        uploader: Uploader,
        client: RegistryClient,
        blob: Blob,
        advance: Callable[[int], None],
        chunk_bytes: int,
    ) -> None:
        self.uploader = uploader
        self.client = client
        self.blob = blob
        self.digest = blob.descriptor.digest
        self.size_bytes = blob.descriptor.size_bytes
        self.body = CheckedBody(blob, advance, stop=client.patience.stop.is_set)
        self.chunk_bytes = chunk_bytes
        self.mode: Mode = uploader.mode
        self.refused: set[Mode] = set()
        self.closing = False
        self.attempt = 1
        self.furthest = 0

    def run(self, session: Upload | None) -> None:
        """Send the blob, from the start again where a session is lost, until it is there or patience ends."""
        while True:
            try:
                if self.send(session or self.client.start_upload()):
                    return
            except AnswerError as error:
                self.consider(error)
            if self.client.blob_size(self.digest) == self.size_bytes:  # the answer was lost, not the blob
                self.body.settle()
                return
            session = None

    def send(self, session: Upload) -> bool:
        """Send the blob through one session; return False where the session was lost on the way."""
        if self.mode == "monolithic":
            self.client.put_blob(session, self.digest, self.body.piece(0, self.size_bytes), self.size_bytes)
            return True
        offset = 0
        while offset < self.size_bytes:
            size = self.size_bytes - offset
            if self.mode == "chunked":
                size = min(size, max(self.chunk_bytes, session.min_chunk_bytes))
            body = self.body.piece(offset, size)
            ranged = self.mode == "chunked"
            try:
                session = self.client.patch(session, body, start=offset, size_bytes=size, ranged=ranged)
                offset += size
            except AnswerError as error:
                reached = self.reached(session, error)
                if reached is None:
                    return False
                session, offset = reached, reached.offset or 0
            if session.offset not in (None, offset):
                raise AnswerError(f"{self.client.transport.host} has {session.offset} bytes where {offset} were sent")
        self.closing = True
        self.client.finish(session, self.digest)
        return True

    def reached(self, session: Upload, error: AnswerError) -> Upload | None:
        """Return the session with how far it got before `error` broke the stream; None where only a new start helps."""
        if not error.transient:
            raise error
        self.mode = "chunked"
        self.client.patience.pause(self.attempt, error)
        self.attempt += 1
        status = self.client.upload_status(session)
        if status is None or not status.offset or status.offset > self.size_bytes:
            return None
        if status.offset >= self.furthest + PROGRESS_BYTES:
            self.furthest, self.attempt = status.offset, 1
        return status

    def consider(self, error: AnswerError) -> None:
        """Choose how to start again after `error`, and wait; raise it where that makes no sense."""
        closing, self.closing = self.closing, False
        if error.final:
            raise error
        if not closing and error.status in _OTHER_MODES:
            self.refused.add(self.mode)
            left = [mode for mode in _OTHER_MODES[error.status] if mode not in self.refused]
            if not left:
                raise error
            self.mode = self.uploader.mode = left[0]
            return
        if closing and error.status == 400:  # the bytes were damaged on the way: once more, but not often
            self.attempt = max(self.attempt, self.client.patience.policy.attempts - 1)
        elif error.status == 401 and self.attempt >= self.client.patience.policy.attempts:
            host = self.client.transport.host
            raise login_error(host, f"{host} lets the login expire before a blob is through") from error
        elif not error.transient and error.status not in _NEW_SESSION:
            raise error
        self.client.patience.pause(self.attempt, error)
        self.attempt += 1


class CheckedBody:
    """A blob's bytes for one or many requests, hashed from the first on as they leave."""

    def __init__(self, blob: Blob, advance: Callable[[int], None], stop: Callable[[], bool] = lambda: False) -> None:
        """Prepare to read `blob`; `advance` is told how far along it is, `stop` ends reading early."""
        self._blob = blob
        self._advance = advance
        self._stop = stop
        self._counted = 0
        self._begin()

    def piece(self, start: int, size_bytes: int) -> Iterator[bytes]:
        """Yield `size_bytes` bytes from offset `start` on; those before are read again where they must be hashed.

        Raises:
            RegistryError: the bytes are not those of the digest.
        """
        if start < self._position:
            self._begin()
        while self._position < start:
            self._next(start - self._position)
        self._count(start)
        end = start + size_bytes
        while self._position < end:
            piece = self._next(end - self._position)
            yield piece
            self._count(self._position)

    def settle(self) -> None:
        """Count the whole blob as arrived."""
        self._count(self._blob.descriptor.size_bytes)

    def _begin(self) -> None:
        self._pieces = self._blob.read()
        self._rest = b""
        self._position = 0
        self._hash = hashlib.sha256()

    def _next(self, at_most: int) -> bytes:
        """Return the next bytes, hashed; the last ones of the blob only if the digest is right."""
        if self._stop():
            raise RegistryError(_STOPPED)
        fresh = self._rest or next(self._pieces, b"")
        piece, self._rest = (fresh, b"") if len(fresh) <= at_most else (fresh[:at_most], fresh[at_most:])
        self._hash.update(piece)
        self._position += len(piece)
        at_end = self._position == self._blob.descriptor.size_bytes
        wrong = at_end and f"sha256:{self._hash.hexdigest()}" != self._blob.descriptor.digest
        if not piece or wrong:
            raise RegistryError(
                f"{self._blob.label} has changed since its digest {self._blob.descriptor.digest} was taken",
                hint="run the command again when nothing writes to the directory, or package it again",
            )
        return piece

    def _count(self, position: int) -> None:
        self._advance(position - self._counted)
        self._counted = position
