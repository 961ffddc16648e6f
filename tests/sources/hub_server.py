"""A model hub on loopback: the part of the hub's HTTP API that downloads use, with faults on demand.

GET /api/models/{id}/revision/{rev}?blobs=true tells about a model (huggingface_hub's `hf_api.py`), X-Error-Code
about an error (its `utils/_http.py`); contents are at /{id}/resolve/{commit}/{path}, large files behind a redirect
to another host.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKEN = "hf_" + "t" * 34  # the shape of a real one
LARGE_BYTES = 10_000
"""Files from this size on lie in large-file storage."""


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """What the server serves and how it misbehaves; tests change it at will."""

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by path, by model id."""
    commits: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    granted: bool = False
    """The account of TOKEN has accepted the licences."""
    corrupt: set[str] = field(default_factory=set)
    """Paths of files that are served with one bit flipped."""
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """By path: how many bytes each next answer gets before the connection breaks."""
    statuses: dict[str, list[int]] = field(default_factory=dict)
    """By path: what the next answers are instead of the file."""
    ranges: bool = True
    """Range requests are honoured."""
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def add(self, model_id: str, files: Mapping[str, bytes]) -> str:
        """Publish a commit of a model and return it."""
        self.models[model_id] = dict(files)
        state = hashlib.sha1(usedforsecurity=False)
        for path, content in sorted(files.items()):
            state.update(path.encode() + content)
        self.commits[model_id] = state.hexdigest()
        return state.hexdigest()

    def fetched(self, path: str) -> list[Request]:
        """Return the requests for the content of the file `path`, redirects not counted."""
        return [
            request
            for request in self.requests
            if request.path.endswith(f"/{path}") and (request.path.startswith("/storage/") or not self._is_large(path))
        ]

    def _is_large(self, path: str) -> bool:
        return any(len(files.get(path, b"")) >= LARGE_BYTES for files in self.models.values())

    def info(self, model_id: str) -> dict[str, Any]:
        """Return the hub's JSON about a model."""
        siblings = []
        for path, content in self.models[model_id].items():
            sibling: dict[str, Any] = {
                "rfilename": path,
                "size": len(content),
                "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest(),
            }
            if len(content) >= LARGE_BYTES:
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
            siblings.append(sibling)
        return {
            "id": model_id,
            "modelId": model_id,
            "sha": self.commits[model_id],
            "private": model_id in self.private,
            "gated": "manual" if model_id in self.gated else False,
            "cardData": {"license": "gemma"},
            "tags": ["license:gemma"],
            "siblings": siblings,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(Request("GET", path, {name.lower(): value for name, value in self.headers.items()}))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else None)
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif parts[:1] == ["storage"]:
            self._content("/".join(parts[1:3]), "/".join(parts[3:]))
        else:
            self._error(404, None)

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _info(self, model_id: str, revision: str | None) -> None:
        hub = self.server.hub
        given = self.headers.get("Authorization")
        if given and not self._authorized():
            self._error(401, None, "Invalid credentials in Authorization header")
        elif model_id not in hub.models or (model_id in hub.private and not self._authorized()):
            self._error(404 if self._authorized() else 401, "RepoNotFound")
        elif revision not in (None, "main", hub.commits[model_id]):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            self._send(200, json.dumps(hub.info(model_id)).encode(), {"Content-Type": "application/json"})

    def _resolve(self, model_id: str, commit: str, path: str) -> None:
        hub = self.server.hub
        if model_id in hub.gated and not (self._authorized() and hub.granted):
            self._error(403 if self._authorized() else 401, "GatedRepo", f"Access to model {model_id} is restricted.")
        elif commit != hub.commits.get(model_id):
            self._error(404, "RevisionNotFound")
        elif path not in hub.models[model_id]:
            self._error(404, "EntryNotFound")
        elif len(hub.models[model_id][path]) >= LARGE_BYTES:
            host = hub.url.replace("127.0.0.1", "localhost")  # another host for the client, the same for the kernel
            self._send(302, b"", {"Location": f"{host}/storage/{model_id}/{path}"})
        else:
            self._content(model_id, path)

    def _content(self, model_id: str, path: str) -> None:
        hub = self.server.hub
        if hub.statuses.get(path):
            self._error(hub.statuses[path].pop(0), None)
            return
        content = hub.models[model_id][path]
        if path in hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        begin, end = 0, len(content)
        headers = {"Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked and hub.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(end, int(last) + 1) if last else end
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        cut = hub.cut_after[path].pop(0) if hub.cut_after.get(path) else None
        self._send(206 if "Content-Range" in headers else 200, content[begin:end], headers, cut)

    def _error(self, status: int, code: str | None, message: str = "refused") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the tests."""


class HubServer:
    """Runs a Hub until the block ends."""

    def __init__(self) -> None:
        self.hub = Hub()
        self._server = _Server(self.hub)
        self.hub.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self.hub

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
