"""The way of one blob into a registry: exists, mounted, or sent, whatever the registry and the network do on the way.

Three ways to send, tried in this order unless the host is known to want another:

    stream      one PATCH with the whole blob, a closing PUT. Nothing to route between several servers.
    monolithic  one PUT with the whole blob, for registries that refuse PATCH or take only small ones.
    chunked     PATCH after PATCH with Content-Range, for proxies that cap a request, and after a stream broke:
                then it goes on where the registry says that it stopped, whether this process began it or a killed one.

The bytes are hashed while they leave: a blob whose digest nobody knows yet is read once, and the closing PUT names
it; of one whose digest is known, the last piece leaves only if it is right.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal

import httpx

from gemma_pack.errors import AccessError, RegistryError
from gemma_pack.oci.auth import login_error
from gemma_pack.oci.body import STOPPED, Blob, CheckedBody
from gemma_pack.oci.client import Upload
from gemma_pack.oci.journal import PushJournal
from gemma_pack.oci.retry import PROGRESS_BYTES, AnswerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gemma_pack.oci.client import RegistryClient

Mode = Literal["stream", "monolithic", "chunked"]
Outcome = Literal["uploaded", "existed", "mounted"]

CHUNK_BYTES: Final = 64 << 20

_MONOLITHIC_HOSTS: Final = re.compile(
    r"ghcr\.io"  # 416 to chunks over 4 MiB
    r"|(.+\.)?gcr\.io|.+\.pkg\.dev"  # Google's take no chunks
    r"|.+\.dkr\.ecr[.-].+\.amazonaws\.com(\.cn)?|public\.ecr\.aws"  # ECR's sessions need parts of its own sizes
)
_OTHER_MODES: Final[dict[int, tuple[Mode, ...]]] = {
    **dict.fromkeys((400, 405, 411, 415, 416, 501), ("monolithic", "chunked")),
    413: ("chunked",),
}
"""What to try when a request with a blob's bytes is refused as such."""
_NO_MOUNT: Final = frozenset({400, 404, 405, 501})
"""Answers to a mount, which the specification lets a registry refuse only by opening a session."""
_NEW_SESSION: Final = frozenset({401, 404, 416})
"""Answers that a new token or a new session may change."""


class Uploader:
    """Brings blobs into one repository; what it learns about the registry serves the next blob."""

    def __init__(
        self,
        client: RegistryClient,
        *,
        mount_from: Sequence[str] = (),
        journal: PushJournal | None = None,
        advance: Callable[[int], None] = lambda _: None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Prepare to upload through `client`.

        Args:
            client: writes to the repository.
            mount_from: repositories of the same registry that may have the blobs already.
            journal: remembers the sessions for the case that this process is killed.
            advance: told of bytes that arrived, negative where some must be sent again.
            chunk_bytes: size of a chunk in chunked mode.
        """
        self.client = client
        self.journal = journal or PushJournal(str(client.reference))
        self.advance = advance
        self.chunk_bytes = chunk_bytes
        self._mount_from = mount_from
        host = client.reference.api_host
        self.mode: Mode = "monolithic" if _MONOLITHIC_HOSTS.fullmatch(host) else "stream"

    def bring(self, blob: Blob) -> Outcome:
        """Make sure that the repository has `blob`, whose digest is known.

        Raises:
            RegistryError: the registry refuses it, or its bytes changed since the digest was taken.
            AccessError: the login does not allow it.
        """
        if self.has(blob.digest or "", blob.size_bytes):
            self.advance(blob.size_bytes)
            self.journal.keep_session(blob.key, "")
            return "existed"
        session = self._resume(blob) or self._mount(blob)
        if session == "mounted":
            self.advance(blob.size_bytes)
            return "mounted"
        _Sending(self, blob).run(session)
        return "uploaded"

    def stream(self, blob: Blob) -> str:
        """Send `blob`, whose digest nobody knows yet, and return it: one read of the file does both.

        Raises:
            RegistryError, AccessError: as `bring`.
        """
        return _Sending(self, blob).run(self._resume(blob))

    def has(self, digest: str, size_bytes: int) -> bool:
        """Tell whether the repository has a blob at its size; one about which the registry fails to answer, it has not.

        A registry of the distribution project that is killed in mid-write keeps an empty link to a blob. It answers 500
        whenever it is asked for that blob, until somebody sends it once more (its issue 4489).
        """
        try:
            return self.client.blob_size(digest) == size_bytes
        except AnswerError as error:
            if error.final and error.status >= 500:
                return False
            raise

    def until_stopped(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on `pieces` until another part of the transfer fails.

        Raises:
            RegistryError: it did; that error, not this one, is the one to show.
        """
        for piece in pieces:
            if self.client.patience.stop.is_set():
                raise RegistryError(STOPPED)
            yield piece

    def _resume(self, blob: Blob) -> Upload | None:
        """Return the session of an earlier process, if the registry still has it and got any of the blob."""
        url = self.journal.session(blob.key)
        if not url or self.mode == "monolithic":
            return None
        try:
            found = self.client.upload_status(Upload(url=httpx.URL(url)))
        except (AnswerError, AccessError, httpx.InvalidURL):  # some registries do not say, and some have forgotten
            return None
        return found if found and found.offset and found.offset <= blob.size_bytes else None

    def _mount(self, blob: Blob) -> Upload | Literal["mounted"] | None:
        session: Upload | None = None
        for source in self._mount_from:
            if session:
                self.client.cancel(session)
            try:
                session = self.client.mount(blob.digest or "", source)
            except AccessError:  # no right to read there; that is no obstacle to uploading here
                session = None
                continue
            except AnswerError as error:  # nor is a registry that mounts nothing
                if error.status not in _NO_MOUNT:
                    raise
                session = None
                continue
            if session is None:
                return "mounted"
        return session


class _Sending:
    """One blob on its way: the mode, the session and the patience left."""

    def __init__(self, uploader: Uploader, blob: Blob) -> None:
        self.uploader = uploader
        self.client = uploader.client
        self.key = blob.key
        self.known = blob.digest is not None
        self.size_bytes = blob.size_bytes
        self.body = CheckedBody(blob, uploader.advance, stop=self.client.patience.stop.is_set)
        self.mode: Mode = uploader.mode
        self.refused: set[Mode] = set()
        self.closing = False
        self.attempt = 1
        self.furthest = 0
        self.taken_up = False

    def run(self, session: Upload | None) -> str:
        """Send the blob, from the start again where a session is lost, until it is there or patience ends."""
        self.taken_up = bool(session and session.offset)
        while True:
            try:
                if self.send(session or self.client.start_upload()):
                    break
            except AnswerError as error:
                self.consider(error)
            known = self.body.digest
            if known and self.uploader.has(known, self.size_bytes):  # the answer was lost, not the blob
                break
            session = None
        self.body.settle()
        self.uploader.journal.keep_session(self.key, "")
        return self.body.whole_digest()

    def send(self, session: Upload) -> bool:
        """Send the blob, or what the session lacks of it; return False where the session was lost on the way."""
        if self.mode == "monolithic":
            digest = self.body.whole_digest()
            self.client.put_blob(session, digest, self.body.piece(0, self.size_bytes), self.size_bytes)
            return True
        offset = session.offset or 0
        if offset:
            self.mode = "chunked"
        while offset < self.size_bytes:
            self.uploader.journal.keep_session(self.key, str(session.url))
            size = self.size_bytes - offset
            if self.mode == "chunked":
                size = min(size, max(self.uploader.chunk_bytes, session.min_chunk_bytes))
            body = self.body.piece(offset, size)
            ranged = self.mode == "chunked"
            try:
                session = self.client.patch(session, body, start=offset, size_bytes=size, ranged=ranged)
                offset += size
            except AnswerError as error:
                reached = self.reached(session, offset, error)
                if reached is None:
                    return False
                session, offset = reached, reached.offset or 0
            if session.offset not in (None, offset):
                raise AnswerError(f"{self.client.transport.host} has {session.offset} bytes where {offset} were sent")
        digest = self.body.whole_digest()
        if not self.known:
            self.uploader.journal.keep_digest(self.key, digest)
        self.uploader.journal.keep_session(self.key, str(session.url))
        self.closing = True
        self.client.finish(session, digest)
        return True

    def reached(self, session: Upload, offset: int, error: AnswerError) -> Upload | None:
        """Return the session with how far it got, where `error` broke the stream; None where only a new start helps.

        A 416 to a chunk from `offset` on says that the registry has another one (distribution-spec, "Pushing a blob in
        chunks"); one that has the same does not want chunks.
        """
        if not error.transient and not (error.status == 416 and offset):
            raise error
        self.mode = "chunked"
        self.client.patience.pause(self.attempt, error)
        self.attempt += 1
        status = self.client.upload_status(session)
        if error.status == 416 and status and status.offset == offset:
            raise error
        if status is None or not status.offset or status.offset > self.size_bytes:
            return None
        if status.offset >= self.furthest + PROGRESS_BYTES:
            self.furthest, self.attempt = status.offset, 1
        return status

    def abandon(self, error: AnswerError) -> bool:
        """Give up a session of an earlier process that the registry neither continues nor closes; tell whether it was.

        What a registry that was killed in mid-write knows of a session may be empty, and stays so.
        """
        if error.status < 500 or not self.taken_up:
            return False
        self.taken_up = False
        self.uploader.journal.keep_session(self.key, "")
        self.attempt = max(1, self.client.patience.policy.attempts - 1)
        return True

    def consider(self, error: AnswerError) -> None:
        """Choose how to start again after `error`, and wait; raise it where that makes no sense."""
        closing, self.closing = self.closing, False
        if error.final and self.abandon(error):
            return
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
