"""A hub on loopback that serves one dataset: the part of the hub's HTTP API that the `datasets` library speaks."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMIT = "d" * 40


class DatasetHub:
    """A server that publishes `files` as the dataset `name`; a context that gives its address.

    `requests` lists what it was asked; `gated` makes it refuse everything but the dataset's page,
    `refusal` answer all with a status and headers.
    """

    def __init__(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        gated: bool = False,
        refusal: tuple[int, dict[str, str]] | None = None,
        commit: str = COMMIT,
    ) -> None:
        self.name = name
        self.files = files
        self.gated = gated
        self.refusal = refusal
        self.commit = commit
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: DatasetHub

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._answer(self.rfile.read(length))

    def _answer(self, body: bytes = b"") -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/{hub.commit}/"
        if hub.refusal:
            self._send(b"{}", status=hub.refusal[0], **hub.refusal[1])
        elif hub.gated and path.startswith(api):
            self._send(b"{}", status=403, **{"X-Error-Code": "GatedRepo"})
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in hub.files]
            self._json({"id": hub.name, "sha": hub.commit, "siblings": siblings, "tags": [], "private": False})
        elif path.startswith(f"{api}/tree/{hub.commit}"):
            self._json([self._entry(name) for name in hub.files])
        elif path.startswith(f"{api}/paths-info/{hub.commit}"):
            asked = json.loads(body)["paths"] if body.startswith(b"{") else []
            self._json([self._entry(name) for name in hub.files if name in asked])
        elif path.startswith(files) and path.removeprefix(files) in hub.files:
            content = hub.files[path.removeprefix(files)]
            etag = hashlib.sha256(content).hexdigest()
            self._send(content, **{"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit})
        else:
            self._send(
                b"{}", status=404, **{"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"}
            )

    def _entry(self, name: str) -> dict[str, object]:
        content = self.hub.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha256(content).hexdigest()[:40]}

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _send(self, body: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
