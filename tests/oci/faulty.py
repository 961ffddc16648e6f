"""A registry in this process that keeps to the distribution specification, until it is told to misbehave.

A `Fault` answers in place of the registry when method and path match, a given number of times. Without faults it is a
small whole registry: sessions with offsets, ranges, mounts, tags, tokens.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import socket
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from gemma_pack.oci.manifest import INDEX_TYPE
from gemma_pack.oci.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PIECE = 1 << 14


@dataclass
class Fault:
    """What happens instead of the right thing, `times` times, after `after` requests that match went well."""

    method: str
    path: str
    act: Callable[[Handler], None]
    times: int = 1
    after: int = 0


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]


@dataclass
class Faulty:
    """The state of the registry, open to the test."""

    host: str = ""
    blobs: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """By repository and digest."""
    manifests: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    """By repository and tag or digest: media type and bytes."""
    sessions: dict[str, bytearray] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    relative: bool = False
    """Locations without scheme and host."""
    login: tuple[str, str] | None = None
    """User and password that the token realm wants; with it, everything wants a token."""
    tokens: dict[str, float] = field(default_factory=dict)
    token_lifetime_s: int = 300
    referrers: bool = False
    """Whether it knows OCI 1.1's list of referrers; two of them a page."""
    numbers: Iterator[int] = field(default_factory=itertools.count)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def count(self, method: str, path: str = "") -> int:
        """Return how many requests of `method` arrived whose path matches."""
        return sum(seen.method == method and bool(re.search(path, seen.path)) for seen in self.seen)

    def fault(self, request: Handler) -> Fault | None:
        """Return the fault that is due for a request."""
        with self.lock:
            for fault in self.faults:
                if fault.method != request.command or not re.search(fault.path, request.path):
                    continue
                if fault.after:
                    fault.after -= 1
                elif fault.times:
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def handle_one_request(self) -> None:
        """Take a client that goes away in mid-request as it comes."""
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def answer(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        """Answer a request whose body was read."""
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self, at_most: int | None = None) -> bytes:
        """Read the request's body, or its first bytes."""
        left = int(self.headers.get("Content-Length", 0))
        left = left if at_most is None else min(left, at_most)
        pieces = []
        while left:
            piece = self.rfile.read(min(PIECE, left))
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def hang_up(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def location(self, path: str) -> str:
        """Return a Location, whole or relative as the registry does it."""
        return path if self.state.relative else f"http://{self.state.host}{path}"

    @property
    def state(self) -> Faulty:
        """The registry's state."""
        return self.server.state

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.state.seen.append(Seen(self.command, parts.path, parts.query, dict(self.headers.items())))
        fault = self.state.fault(self)
        if fault:
            fault.act(self)
            return
        if self.state.login and not self._may(parts.path):
            return
        self._route(parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()})

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - the library's names

    def _may(self, path: str) -> bool:
        state = self.state
        assert state.login
        if path == "/token":
            expected = "Basic " + base64.b64encode(":".join(state.login).encode()).decode()
            if self.headers.get("Authorization") != expected:
                self.answer(401)
                return False
            token = f"token-{next(state.numbers)}"
            state.tokens[token] = 1.0
            answer = {"token": token, "expires_in": state.token_lifetime_s}
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())
            return False
        if self.headers.get("Authorization", "").removeprefix("Bearer ") in state.tokens:
            return True
        self.body()
        challenge = f'Bearer realm="http://{state.host}/token",service="faulty"'
        self.answer(401, {"WWW-Authenticate": challenge})
        return False

    def _route(self, path: str, query: Mapping[str, str]) -> None:
        if path == "/v2/":
            self.answer(200)
        elif found := re.fullmatch(r"/v2/(.+)/blobs/uploads/([\w-]*)", path):
            self._upload(found[1], found[2], query)
        elif found := re.fullmatch(r"/v2/(.+)/blobs/(sha256:\w+)", path):
            self._blob(found[1], found[2])
        elif found := re.fullmatch(r"/v2/(.+)/manifests/([\w.:-]+)", path):
            self._manifest(found[1], found[2])
        elif (found := re.fullmatch(r"/v2/(.+)/referrers/(sha256:\w+)", path)) and self.state.referrers:
            self._referrers(found[1], found[2], int(query.get("begin", "0")))
        elif found := re.fullmatch(r"/v2/(.+)/tags/list", path):
            tags = sorted(tag for name, tag in self.state.manifests if name == found[1] and ":" not in tag)
            self.answer(200 if tags else 404, {}, json.dumps({"name": found[1], "tags": tags}).encode())
        else:
            self.answer(404)

    def _upload(self, repository: str, name: str, query: Mapping[str, str]) -> None:
        state = self.state
        path = f"/v2/{repository}/blobs/uploads/"
        if self.command == "POST":
            digest = query.get("mount", "")
            if (query.get("from", ""), digest) in state.blobs:
                state.blobs[repository, digest] = state.blobs[query["from"], digest]
                self.answer(201, {"Location": self.location(f"/v2/{repository}/blobs/{digest}")})
                return
            name = f"session-{next(state.numbers)}"
            state.sessions[name] = bytearray()
            self.answer(202, {"Location": self.location(f"{path}{name}?_state=a%3Db"), "Range": "0-0"})
            return
        session = state.sessions.get(name)
        if session is None:
            self.body()
            self.answer(404, {}, json.dumps({"errors": [{"code": "BLOB_UPLOAD_UNKNOWN"}]}).encode())
        elif self.command == "GET":
            self.answer(204, {"Location": self.location(f"{path}{name}"), "Range": f"0-{max(0, len(session) - 1)}"})
        elif self.command == "DELETE":
            del state.sessions[name]
            self.answer(204)
        elif self.command == "PATCH":
            begin = self.headers.get("Content-Range", "0-").partition("-")[0]
            if int(begin) != len(session):
                self.body()
                self.answer(416)
                return
            session += self.body()
            self.answer(202, {"Location": self.location(f"{path}{name}"), "Range": f"0-{len(session) - 1}"})
        else:
            session += self.body()
            self._close(repository, name, bytes(session), query["digest"])

    def _close(self, repository: str, name: str, data: bytes, digest: str) -> None:
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            self.answer(400, {}, json.dumps({"errors": [{"code": "DIGEST_INVALID", "message": "no match"}]}).encode())
            return
        del self.state.sessions[name]
        self.state.blobs[repository, digest] = data
        self.answer(201, {"Location": self.location(f"/v2/{repository}/blobs/{digest}")})

    def _blob(self, repository: str, digest: str) -> None:
        data = self.state.blobs.get((repository, digest))
        if data is None:
            self.answer(404)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            begin = int(wanted[1])
            end = min(len(data), int(wanted[2] or len(data)) + 1)
            self.answer(206, {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}, data[begin:end])
        else:
            self.answer(200, {"Docker-Content-Digest": digest}, data)

    def _manifest(self, repository: str, target: str) -> None:
        if self.command == "PUT":
            data = self.body()
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            for key in {target, digest}:
                self.state.manifests[repository, key] = (self.headers["Content-Type"], data)
            subject = json.loads(data).get("subject") if self.state.referrers else None
            told = {"OCI-Subject": subject["digest"]} if subject else {}
            self.answer(201, {"Docker-Content-Digest": digest, **told})
            return
        media_type, data = self.state.manifests.get((repository, target), ("", b""))
        if not data:
            self.answer(404)
            return
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.answer(200, {"Content-Type": media_type, "Docker-Content-Digest": digest}, data)

    def _referrers(self, repository: str, subject: str, begin: int) -> None:
        found = []
        for (name, key), (media_type, data) in sorted(self.state.manifests.items()):
            document = json.loads(data)
            if name == repository and ":" in key and document.get("subject", {}).get("digest") == subject:
                told = {name: document[name] for name in ("artifactType", "annotations") if name in document}
                found.append({"mediaType": media_type, "digest": key, "size": len(data), **told})
        end = begin + 2
        link = {"Link": f'</v2/{repository}/referrers/{subject}?begin={end}>; rel="next"'} if found[end:] else {}
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": found[begin:end]}
        self.answer(200, {"Content-Type": INDEX_TYPE, **link}, json.dumps(index).encode())


def say(status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Callable[[Handler], None]:
    """Return the fault of answering `status`, having read and dropped the body."""

    def act(request: Handler) -> None:
        request.body()
        request.answer(status, headers, body)

    return act


def cut_upload(after: int, *, keep: bool = True) -> Callable[[Handler], None]:
    """Return the fault of hanging up after `after` bytes of a PATCH; the session keeps them, or is lost."""

    def act(request: Handler) -> None:
        name = urlsplit(request.path).path.rpartition("/")[2]
        begin = int(request.headers.get("Content-Range", "0-").partition("-")[0])
        data = request.body(after)
        if keep:
            request.state.sessions[name][begin:] = data
        else:
            del request.state.sessions[name]
        request.hang_up()

    return act


def cut_download(after: int) -> Callable[[Handler], None]:
    """Return the fault of promising a whole blob, or what is left of it, and hanging up after `after` bytes."""

    def act(request: Handler) -> None:
        repository, digest = re.fullmatch(r"/v2/(.+)/blobs/(sha256:\w+)", request.path).groups()  # type: ignore[union-attr]
        data = request.state.blobs[repository, digest]
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        begin = int(wanted[1]) if wanted else 0
        request.send_response(206 if wanted else 200)
        request.send_header("Content-Length", str(len(data) - begin))
        if wanted:
            request.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        request.wfile.write(data[begin : begin + after])
        request.wfile.flush()
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)

    return act


class _Cut:
    """Passes on the first bytes of an answer, and drops the rest."""

    def __init__(self, stream: Any, left: int) -> None:
        """Wrap what a handler writes to."""
        self._stream = stream
        self._left = left

    def write(self, data: bytes) -> int:
        """Write what is left of the first bytes."""
        self._stream.write(data[: self._left])
        self._left = max(0, self._left - len(data))
        return len(data)

    def flush(self) -> None:
        """Pass it on."""
        self._stream.flush()


def cut_answer(after: int) -> Callable[[Handler], None]:
    """Return the fault of doing the right thing, and hanging up after `after` bytes of the answer."""

    def act(request: Handler) -> None:
        stream = request.wfile
        request.wfile = _Cut(stream, after)  # type: ignore[assignment]
        try:
            request._serve()
        finally:
            request.wfile = stream
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)

    return act


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, state: Faulty) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state = state
        state.host = f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no error here."""


@contextmanager
def faulty_registry() -> Iterator[Faulty]:
    """Run the registry until the block ends."""
    state = Faulty()
    with _Server(state) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join(5)


class Pauses(threading.Event):
    """Stands in for waiting: remembers for how long, and does not."""

    def __init__(self) -> None:
        """Start with no pauses."""
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        """Note the pause and go on at once."""
        self.seconds.append(timeout or 0.0)
        return self.is_set()


def quick(attempts: int = 4) -> Retry:
    """Return a policy without pauses of its own; a Retry-After is still waited for."""
    return Retry(attempts=attempts, base_s=0.0)
