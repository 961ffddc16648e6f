"""The registry protocol, one method a request: blobs, upload sessions, manifests.

Each method does one thing of the distribution specification and says what came of it; what to do next
(mount, stream, resume, start again) is decided in `upload` and `pull`.

Source: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import quote

import httpx

from gemma_pack.errors import RegistryError
from gemma_pack.oci.manifest import (
    INDEX_TYPE,
    INDEX_TYPES,
    MANIFEST_TYPE,
    MANIFEST_TYPES,
    Descriptor,
    Document,
    Index,
    parse_json,
    sha256_digest,
)
from gemma_pack.oci.reference import is_tag
from gemma_pack.oci.retry import AnswerError, Retry
from gemma_pack.oci.transport import Answer, Timeouts, Transport

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from gemma_pack.oci.reference import Reference

_ACCEPT: Final = ", ".join(sorted(INDEX_TYPES) + sorted(MANIFEST_TYPES))
_BINARY: Final = "application/octet-stream"
FRESH_FOR_S: Final = 60.0
"""A token that closes an upload is at least this fresh: registries check it again when they commit."""
_REFERRERS_ANSWERS: Final = (200, 400, 404, 405, 406)
"""To a request for referrers: 404 of those that do not know them by the specification, and what others say instead."""
MAX_TAGS: Final = 100
MAX_REFERRER_PAGES: Final = 20
STALL_WINDOW_S: Final = 60.0
STALL_BYTES: Final = 64 << 10
"""A download slower than this in a whole window counts as broken: a trickle never trips a timeout on silence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An open upload session: where its next request goes, and how many bytes the registry says it has."""

    url: httpx.URL
    offset: int | None = None
    min_chunk_bytes: int = 0
    """The smallest chunk, but for the last, that the registry takes (`OCI-Chunk-Min-Length`)."""


@dataclass(frozen=True, slots=True)
class BlobStream:
    """A blob's bytes from `offset` on; what the registry sent, unchecked."""

    offset: int
    pieces: Iterator[bytes]


class RegistryClient:
    """Speaks to one repository of one registry. Threads may share it; close it, or use it in `with`."""

    def __init__(
        self,
        reference: Reference,
        *,
        writable: bool = False,
        plain_http: bool = False,
        ca_file: Path | None = None,
        retry: Retry | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        """Prepare to read, or to write as well, the repository of `reference`. See `Transport` for the others."""
        self.reference = reference
        self.transport = Transport(reference, plain_http=plain_http, ca_file=ca_file, retry=retry, timeouts=timeouts)
        self.patience = self.transport.patience
        self._scope = f"repository:{reference.repository}:{'pull,push' if writable else 'pull'}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()

    def ping(self) -> None:
        """Check that a registry answers.

        Raises:
            RegistryError: something else does.
            OfflineError: nothing does.
        """
        answer = self.transport.request("GET", self.transport.base.join("/v2/"), expected=(200, 401, 403, 404))
        if answer.status == 404:
            raise RegistryError(
                f"{self.transport.host} does not speak the registry protocol: it has no /v2/",
                hint="check the host and the port of the reference",
            )

    def blob_size(self, digest: str) -> int | None:
        """Return the size in bytes of a blob that the repository has, else None."""
        answer = self.transport.request(
            "HEAD", self._url(f"blobs/{digest}"), expected=(200, 404), scopes=(self._scope,)
        )
        if answer.status == 404:
            return None
        length = answer.headers.get("content-length", "")
        if not length.isdigit():
            raise RegistryError(f"{self.transport.host} does not say how large {digest} is")
        return int(length)

    def mount(self, digest: str, source: str) -> Upload | None:
        """Ask for a blob of the repository `source`: None if it is mounted now, else the session opened instead."""
        url = self._url(f"blobs/uploads/?mount={quote(digest, safe='')}&from={quote(source, safe='')}")
        scopes = (self._scope, f"repository:{source}:pull")
        answer = self.transport.request("POST", url, expected=(201, 202), scopes=scopes)
        return None if answer.status == 201 else self._session(answer)

    def start_upload(self) -> Upload:
        """Open an upload session."""
        answer = self.transport.request("POST", self._url("blobs/uploads/"), expected=(202,), scopes=(self._scope,))
        return self._session(answer)

    def patch(self, upload: Upload, body: Iterable[bytes], *, start: int, size_bytes: int, ranged: bool) -> Upload:
        """Send `size_bytes` of a blob from offset `start` on, and return the session for what follows.

        Args:
            upload: the session.
            body: the bytes, read once.
            start: offset in the blob.
            size_bytes: bytes to send.
            ranged: send Content-Range, as the specification's chunks have; one long PATCH goes without.
        """
        headers = {"Content-Type": _BINARY}
        if ranged:
            headers["Content-Range"] = f"{start}-{start + size_bytes - 1}"
        answer = self.transport.upload(
            "PATCH",
            upload.url,
            body,
            size_bytes=size_bytes,
            expected=(201, 202, 204),  # ECR says 201
            scopes=(self._scope,),
            headers=headers,
        )
        return self._session(answer)

    def finish(self, upload: Upload, digest: str) -> None:
        """Close a session, all of whose bytes were sent, with the blob's digest.

        Raises:
            RegistryError: the registry has the blob under another digest.
        """
        answer = self.transport.request(
            "PUT",
            _closing(upload, digest),
            expected=(201, 204),
            scopes=(self._scope,),
            headers={"Content-Type": _BINARY},
            fresh_for_s=FRESH_FOR_S,
            patient=True,
        )
        self._check_echo(answer, digest)

    def put_blob(self, upload: Upload, digest: str, body: Iterable[bytes], size_bytes: int) -> None:
        """Send a whole blob in the request that closes a session to which nothing was sent before.

        Raises:
            RegistryError: the registry has the blob under another digest.
        """
        answer = self.transport.upload(
            "PUT",
            _closing(upload, digest),
            body,
            size_bytes=size_bytes,
            expected=(201, 204),
            scopes=(self._scope,),
            headers={"Content-Type": _BINARY},
            fresh_for_s=FRESH_FOR_S,
        )
        self._check_echo(answer, digest)

    def upload_status(self, upload: Upload) -> Upload | None:
        """Return the session with the offset that the registry has reached; None where the session is lost."""
        answer = self.transport.request("GET", upload.url, expected=(200, 202, 204, 404, 416), scopes=(self._scope,))
        if answer.status in (404, 416):
            return None
        session = self._session(answer, default=upload.url)
        return session if session.offset is not None else replace(session, offset=0)

    def cancel(self, upload: Upload) -> None:
        """Drop a session; a registry that cannot will drop it by age."""
        self.transport.request("DELETE", upload.url, expected=range(200, 600), scopes=(self._scope,))

    def manifest(self, target: str) -> Document:
        """Return the manifest or index behind a tag or a digest.

        Raises:
            RegistryError: there is none, or its bytes are not those of its digest.
        """
        found = self.find_manifest(target)
        if found is None:
            raise RegistryError(
                f"{self.transport.host} has no image {self.reference.repository} under {target}",
                hint="check the repository and the tag; skopeo list-tags shows what there is",
            )
        return found

    def find_manifest(self, target: str) -> Document | None:
        """Return the manifest or index behind a tag or a digest, or None where there is none.

        Raises:
            RegistryError: its bytes are not those of its digest.
        """
        url = self._url(f"manifests/{target}")
        answer = self.transport.request(
            "GET", url, expected=(200, 404), scopes=(self._scope,), headers={"Accept": _ACCEPT}
        )
        if answer.status == 404:
            return None
        digest = sha256_digest(answer.body)
        if target.startswith("sha256:") and digest != target:
            raise RegistryError(f"{self.transport.host} sent other bytes than those of {target}")
        self._check_echo(answer, digest)
        media_type = answer.headers.get("content-type", "").partition(";")[0].strip()
        descriptor = Descriptor(media_type=media_type, digest=digest, size_bytes=len(answer.body))
        return Document(data=answer.body, descriptor=descriptor)

    def tags(self) -> tuple[str, ...]:
        """Return tags of images, at most those of one answer; none where it has none or does not say."""
        answer = self.transport.request(
            "GET", self._url(f"tags/list?n={MAX_TAGS}"), expected=range(200, 600), scopes=(self._scope,)
        )
        if answer.status != 200:
            return ()
        tags = parse_json(answer.body, origin=f"the list of tags of {self.reference.repository}").get("tags")
        return tuple(filter(_names_an_image, tags)) if isinstance(tags, list) else ()

    def put_manifest(self, target: str, data: bytes, media_type: str) -> str:
        """Store a manifest or index under a tag or its digest, and return its digest.

        Raises:
            RegistryError: the registry took it for something with another digest.
        """
        self._put_manifest(target, data, media_type)
        return sha256_digest(data)

    def put_referrer(self, data: bytes) -> bool:
        """Store a manifest that has a subject under its digest; tell whether the registry lists it as a referrer.

        One that does not know referrers takes it for any manifest, and says nothing (distribution-spec, "Pushing
        Manifests with Subject").
        """
        answer = self._put_manifest(sha256_digest(data), data, MANIFEST_TYPE)
        return "oci-subject" in answer.headers

    def referrers(self, digest: str) -> list[Descriptor] | None:
        """Return what refers to a manifest, as the registry lists it; None where it keeps no such list.

        Raises:
            RegistryError: the list is broken, or too long.
        """
        url = self._url(f"referrers/{digest}")
        found: list[Descriptor] = []
        for _ in range(MAX_REFERRER_PAGES):
            answer = self.transport.request(
                "GET", url, expected=_REFERRERS_ANSWERS, scopes=(self._scope,), headers={"Accept": INDEX_TYPE}
            )
            # what stands before a registry may answer any path with a page of its own
            if answer.status != 200 or answer.headers.get("content-type", "").partition(";")[0].strip() != INDEX_TYPE:
                return None
            found += Index.parse(answer.body, origin=f"the list of referrers of {digest}").manifests
            following = re.match(r'<([^>]+)>;\s*rel="?next"?', answer.headers.get("link", ""))
            if not following:
                return found
            url = self.transport.resolve(answer.url, following[1])
        raise RegistryError(f"{self.transport.host} lists the referrers of {digest} without end")

    @contextmanager
    def open_blob(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[BlobStream]:
        """Open a blob from offset `start` up to `end`; the registry may ignore both: the stream says where it begins.

        Raises:
            RegistryError: the repository has no such blob. While reading: AnswerError, where the connection breaks.
        """
        ranged = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        headers = {"Accept": "*/*"} | ranged
        url = self._url(f"blobs/{digest}")
        expected = (200, 206) if ranged else (200,)
        with self.transport.stream(url, expected=expected, scopes=(self._scope,), headers=headers) as response:
            offset = start if response.status_code == 206 else 0
            if response.status_code == 206 and not response.headers.get("content-range", "").startswith(
                f"bytes {start}-"
            ):
                raise RegistryError(f"{self.transport.host} sent another range of {digest} than asked for")
            yield BlobStream(offset, self._pieces(response))

    def _pieces(self, response: httpx.Response) -> Iterator[bytes]:
        window_s, in_window = time.monotonic(), 0
        try:
            for piece in response.iter_raw():
                yield piece
                in_window += len(piece)
                now_s = time.monotonic()
                if now_s - window_s > STALL_WINDOW_S:
                    if in_window < STALL_BYTES:
                        raise AnswerError(f"{self.transport.host} sent {in_window} bytes in {now_s - window_s:.0f} s")
                    window_s, in_window = now_s, 0
        except httpx.TransportError as error:
            raise self.transport.broken(error) from error

    def _url(self, path: str) -> httpx.URL:
        return self.transport.base.join(f"/v2/{self.reference.repository}/{path}")

    def _put_manifest(self, target: str, data: bytes, media_type: str) -> Answer:
        answer = self.transport.request(
            "PUT",
            self._url(f"manifests/{target}"),
            expected=(200, 201, 202),
            scopes=(self._scope,),
            headers={"Content-Type": media_type},
            content=data,
            fresh_for_s=FRESH_FOR_S,
        )
        self._check_echo(answer, sha256_digest(data))
        return answer

    def _session(self, answer: Answer, default: httpx.URL | None = None) -> Upload:
        location = answer.headers.get("location", "")
        url = default if default and not location else self.transport.resolve(answer.url, location)
        received = re.fullmatch(r"(?:bytes=)?0-([0-9]{1,18})", answer.headers.get("range", ""))
        # "0-0" is one byte by the letter, and what registries say for none
        offset = int(received[1]) + 1 if received and received[1] != "0" else None
        smallest = re.fullmatch(r"[0-9]{1,18}", answer.headers.get("oci-chunk-min-length", ""))
        return Upload(url=url, offset=offset, min_chunk_bytes=int(smallest[0]) if smallest else 0)

    def _check_echo(self, answer: Answer, digest: str) -> None:
        echoed = answer.headers.get("docker-content-digest", digest)
        if echoed != digest and echoed.startswith("sha256:"):
            raise RegistryError(
                f"{self.transport.host} stored {echoed} where {digest} was sent",
                hint="something between here and the registry changes what passes through",
            )


def _names_an_image(tag: object) -> bool:
    """Tell a tag from what is none, and from those under which lists of referrers and signatures are kept."""
    return isinstance(tag, str) and is_tag(tag) and not re.match(r"sha256-[0-9a-f]{64}", tag)


def _closing(upload: Upload, digest: str) -> httpx.URL:
    """Return the session's URL, its own query untouched, with the digest that closes it."""
    separator = "&" if upload.url.query else "?"
    return httpx.URL(f"{upload.url}{separator}digest={quote(digest, safe='')}")
