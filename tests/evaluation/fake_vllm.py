"""A server that answers as vLLM 0.32 does, field by field, with a tiny model of this process, and fails on request."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.evaluation.engines.reading import ResidentReader
from gemma_pack.report import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass
class FakeVllm:
    """What the server serves, what it was asked, and how it misbehaves."""

    directory: Path
    reader: ResidentReader
    address: str = ""
    names: list[str] = field(default_factory=lambda: ["gemma"])
    max_model_len: int = 512
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    fail: int = 0
    """So many of the next completions are answered with 503."""
    die_after: int | None = None
    """After so many completions every connection is cut."""
    spoil: dict[str, Any] = field(default_factory=dict)
    """Fields of a choice to replace."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the choice of a completion."""
        prompt, limit = body["prompt"], body["max_tokens"]
        [answer] = self.reader.answers([prompt], limit)
        choice: dict[str, Any] = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if answer.ended else "length",
            "token_ids": list(answer.tokens),
            "prompt_token_ids": prompt,
            "prompt_logprobs": None,
        }
        if (k := body.get("prompt_logprobs")) is not None:
            [reading] = self.reader.read([prompt], k)
            rows: list[dict[str, Any] | None] = [None]
            for token, nll, ids, logprobs in zip(
                reading.ids, reading.nll, reading.top_ids, reading.top_logprobs, strict=True
            ):
                entries = {str(token): {"logprob": -float(nll), "rank": 99, "decoded_token": "?"}}
                for rank, (name, logprob) in enumerate(zip(ids, logprobs, strict=True), 1):
                    entries[str(name)] = {"logprob": float(logprob), "rank": rank, "decoded_token": "?"}
                rows.append(entries)
            choice["prompt_logprobs"] = rows
        return choice | self.spoil

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Return status and body of an answer; None cuts the connection."""
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/v1/models":
            models = [
                {"id": name, "object": "model", "root": str(self.directory), "parent": None,
                 "max_model_len": self.max_model_len}
                for name in self.names
            ]  # fmt: skip
            return 200, {"object": "list", "data": models}
        self.asked.append(body)
        if self.die_after is not None and len(self.asked) > self.die_after:
            return None
        if self.fail:
            self.fail -= 1
            return 503, {"error": {"message": "the engine\nis busy"}}
        if body["model"] not in self.names:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        return 200, {"object": "text_completion", "model": self.names[0], "choices": [self.choice(body)]}


@contextmanager
def fake_vllm(directory: Path) -> Iterator[FakeVllm]:
    """Serve the checkpoint in `directory` on loopback until the block ends."""
    engine = Engine(name="transformers", versions={}, device="cpu", attention="sdpa")
    state = FakeVllm(directory, ResidentReader(load(directory, "variant", "cpu"), lambda _: engine))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.respond({})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, body: dict[str, Any]) -> None:
            with state.lock:
                if state.key and self.headers.get("Authorization") != f"Bearer {state.key}":
                    found: tuple[int, dict[str, Any]] | None = (401, {"error": "Unauthorized"})
                else:
                    found = state.answer(self.path, body)
            if found is None:
                self.close_connection = True
                return
            data = json.dumps(found[1]).encode()
            self.send_response(found[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            del arguments

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
