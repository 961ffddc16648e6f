"""A model behind vLLM's OpenAI-compatible HTTP interface, as a Reader: what is validated is what is served.

Prompts go as token ids, so that each begins with the one <bos> that the caller put there and no server adds another;
the answer names the ids that were read, and they are compared. Requests that fail for a moment are tried again.
Source of the fields: vLLM's protocol.py of /v1/completions (`prompt_logprobs`, `return_token_ids`) and /v1/models.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import httpx
import numpy as np

from gemma_pack.errors import AccessError, EngineError, InvalidUsageError, QuantizationError
from gemma_pack.evaluation.engines.in_process import Answer
from gemma_pack.evaluation.engines.reading import Done, Reading, ignore, ordered
from gemma_pack.report import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")

ATTEMPTS: Final = 5
PAUSE_S: Final = 1.0
"""Before the second attempt; doubled before each further one: a server that restarts behind a proxy is waited for."""
TRANSIENT: Final = frozenset({408, 429, 500, 502, 503, 504})
UNLIMITED_TOKENS: Final = 1 << 20
"""Of a server that does not say how much it reads."""
TIMEOUT: Final = httpx.Timeout(600.0, connect=10.0)
"""A window of a large model on a CPU takes minutes."""
PARALLEL: Final = 8
"""Requests under way at once; the server batches them."""
GREEDY: Final[dict[str, Any]] = {
    "temperature": 0,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""Every setting that a server might otherwise take from the model's generation_config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server says that it serves."""

    model: str
    answers_as: str
    """What its answers call it: of a model's names vLLM gives the first (`OpenAIServingModels.model_name`)."""
    root: str
    """The path or hub id that the server loaded; the same as `model` where it does not say."""
    max_model_len: int
    version: str


class ServerReader:
    """The model that a server serves, as a Reader."""

    def __init__(
        self, url: str, role: str, *, model: str | None = None, own: bool = False, attempts: int = ATTEMPTS
    ) -> None:
        """Ask the server at `url` what it serves, and take the model called `model`, or the only one.

        A key is sent where VLLM_API_KEY, vLLM's own variable, has one. `own` is a server that was started for this.
        What fails for a moment is asked `attempts` times.

        Raises:
            InvalidUsageError: `url` is no http address, or the server has no such model.
            EngineError: nothing answers there as vLLM does.
            AccessError: the server wants a key.
        """
        host = _require_address(url, role)
        self.role = role
        self.url = url.rstrip("/").removesuffix("/v1")
        self._own, self._attempts = own, attempts
        key = None if own else _key()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=TIMEOUT,
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),  # a proxy is not on the way to loopback
            limits=httpx.Limits(max_connections=PARALLEL),
        )
        self._stop = threading.Event()
        try:
            self.served = self._find(model)
        except BaseException:
            self.close()
            raise
        self.max_length = self.served.max_model_len - 1  # one token is answered, even where only the prompt counts

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def require_length(self, window: int) -> None:
        """Raise InvalidUsageError unless the server reads windows of `window` tokens."""
        if window > self.max_length:
            raise InvalidUsageError(
                f"{self.url} reads {self.max_length} tokens at most, and a window has {window}",
                hint="start it with a larger --max-model-len, or use a --profile with shorter windows",
            )

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        k: int,
        done: Done = ignore,
        *,
        parallel: int = PARALLEL,
    ) -> list[Reading]:
        """Return the reading of each sequence; `parallel` of them are under way at once.

        Raises:
            EngineError: the server failed for good, or does not give log-probabilities of prompts.
            QuantizationError: the served model computes NaN.
        """
        self.require_length(max(map(len, sequences), default=0))

        def one(item: tuple[int, Sequence[int]]) -> Reading:
            place, sequence = item
            choice = self._complete(sequence, max_tokens=1, prompt_logprobs=k)
            reading = self._reading(sequence, choice.get("prompt_logprobs"), k)
            done(place, reading)
            return reading

        return self._all(one, list(enumerate(sequences)), parallel)

    def answers(self, prompts: Sequence[Sequence[int]], limit: int) -> list[Answer]:
        """Return the greedy continuations of `prompts`, of at most `limit` tokens each, the end token included."""

        def one(prompt: Sequence[int]) -> Answer:
            choice = self._complete(prompt, max_tokens=limit)
            tokens = choice.get("token_ids")
            if not isinstance(tokens, list):
                raise self._stranger("it does not return token ids")
            return Answer(tuple(tokens), choice.get("finish_reason") == "stop")

        return self._all(one, prompts, PARALLEL)

    def describe(self) -> Engine:
        """Return what the report says of the engine; a server of our own has another port each time."""
        return Engine(
            name="vllm",
            versions={"vllm": self.served.version},
            device="a server of its own" if self._own else f"{self.url}, {self.served.model} from {self.served.root}",
            attention="the server's",
            dtype="bfloat16" if self._own else "the server's dtype",
        )

    def _find(self, wanted: str | None) -> Served:
        """Return the model called `wanted`, or the only one that is no adapter."""
        listed = self._ask("GET", "/v1/models").get("data")
        if not isinstance(listed, list) or not all(isinstance(model, dict) and model.get("id") for model in listed):
            raise self._stranger("it lists no models")
        names = [model["id"] for model in listed]
        found = [model for model in listed if (model["id"] == wanted if wanted else not model.get("parent"))]
        if len(found) != 1:
            raise InvalidUsageError(
                f"{self.url} serves {', '.join(names)}" + (f", not {wanted}" if wanted else ""),
                hint="name one of them with --served-model",
            )
        [model] = found
        same = [one["id"] for one in listed if not one.get("parent") and one.get("root") == model.get("root")]
        return Served(
            model=model["id"],
            answers_as=model["id"] if model.get("parent") or not same else same[0],
            root=model.get("root") or model["id"],
            max_model_len=int(model.get("max_model_len") or UNLIMITED_TOKENS),
            version=str(self._ask("GET", "/version").get("version", "unknown")),
        )

    def _complete(self, prompt: Sequence[int], **settings: Any) -> dict[str, Any]:  # noqa: ANN401 - of the request
        """Return the one choice of a greedy completion of `prompt`."""
        ids = [int(token) for token in prompt]
        body = {"model": self.served.model, "prompt": ids, "return_token_ids": True, **GREEDY, **settings}
        answer = self._ask("POST", "/v1/completions", body)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._stranger("it answers without a choice")
        if answer.get("model") not in (self.served.model, self.served.answers_as):
            raise EngineError(f"{self.url} answered with {answer.get('model')}, asked for {self.served.model}")
        choice: dict[str, Any] = choices[0]
        if choice.get("prompt_token_ids") not in (None, ids):
            raise self._stranger("it read other tokens than it was sent")
        return choice

    def _reading(self, sequence: Sequence[int], found: Any, k: int) -> Reading:  # noqa: ANN401 - JSON
        """Return what `prompt_logprobs` of an answer says: null, then for each token {id: {logprob, rank, ...}}.

        The token that was read comes first, and has a place of its own where it is not among the top k.
        """
        if not isinstance(found, list) or len(found) != len(sequence):
            raise self._stranger("it gives no log-probabilities of the prompt")
        count = len(sequence) - 1
        nll = np.empty(count)
        top_ids, top_logprobs = np.empty((count, k), np.int64), np.empty((count, k))
        for place, (token, entries) in enumerate(zip(sequence[1:], found[1:], strict=True)):
            try:
                logprobs = {int(name): float(entry["logprob"]) for name, entry in entries.items()}
                nll[place] = -logprobs[int(token)]
            except (AttributeError, TypeError, KeyError, ValueError) as error:
                raise self._stranger("its log-probabilities are not vLLM's") from error
            if len(logprobs) == k + 1:
                del logprobs[int(token)]
            if len(logprobs) != k:
                raise self._stranger(f"it gives {len(logprobs)} log-probabilities of a token, asked for {k}")
            top_ids[place], top_logprobs[place] = list(logprobs), list(logprobs.values())
        if not np.isfinite(nll).all() or np.isnan(top_logprobs).any():
            raise QuantizationError(
                f"the {self.role} that {self.url} serves computes NaN or infinity",
                hint="validate with --engine transformers: it names the layer",
            )
        return ordered(ids=np.array(sequence[1:]), nll=nll, top_ids=top_ids, top_logprobs=top_logprobs)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON object that the server answers with, trying again what may pass."""
        cause: Exception | None = None
        for attempt in range(self._attempts):
            try:
                answer = self._client.request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                cause, reason = error, f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if answer.status_code not in TRANSIENT:
                    return self._parsed(answer, path)
                cause, reason = None, f"{answer.status_code} {_said(answer)}"
            if attempt + 1 == self._attempts or self._stop.wait(PAUSE_S * 2**attempt):
                break
        if self._attempts == 1:
            raise EngineError(
                f"{self.url} does not answer: {reason}", hint="start the server, or correct its address"
            ) from cause
        raise EngineError(
            f"{self.url} fails at {path} after {attempt + 1} attempts: {reason}",
            hint="look into the server's log; the same command goes on with the windows that are read",
        ) from cause

    def _parsed(self, answer: httpx.Response, path: str) -> dict[str, Any]:
        if answer.status_code in (401, 403):
            raise AccessError(f"{self.url} wants a key", hint="set VLLM_API_KEY to the key that the server was given")
        if answer.status_code == httpx.codes.NOT_FOUND and path == "/version":
            return {}
        if answer.status_code != httpx.codes.OK:
            raise EngineError(f"{self.url} refuses {path}: {answer.status_code} {_said(answer)}")
        try:
            parsed = answer.json()
        except ValueError as error:
            raise self._stranger(f"{path} is not JSON") from error
        if not isinstance(parsed, dict):
            raise self._stranger(f"{path} is no JSON object")
        return parsed

    def _stranger(self, how: str) -> EngineError:
        return EngineError(
            f"{self.url} does not answer as vLLM does: {how}", hint="--engine takes the address of a vLLM server"
        )

    def _all(self, one: Callable[[Item], Result], items: Sequence[Item], parallel: int) -> list[Result]:
        """Return `one` of each item; the first that fails stops the others before their next attempt."""
        self._stop.clear()
        with ThreadPoolExecutor(parallel) as pool:
            futures = [pool.submit(one, item) for item in items]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                return [future.result() for future in futures]
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _said(answer: httpx.Response) -> str:
    """Return the message of an error, as vLLM words it or as it is, on one line."""
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text
    return " ".join(str(message).split())[:300]


def _require_address(url: str, role: str) -> str:
    """Return the host in a server's address; raise InvalidUsageError where there is none, or a login."""
    try:
        parts = urlsplit(url)
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL) as error:
        raise InvalidUsageError(
            f"the address of the {role}'s server is none: {error}", hint="give it as http://HOST:PORT"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidUsageError(
            f"{url} is no address of a server", hint="give it as http://HOST:PORT, or use --engine vllm"
        )
    if parts.username or parts.password:
        raise InvalidUsageError(
            f"the address of the {role}'s server holds a login, which the report would show",
            hint="put the key into VLLM_API_KEY",
        )
    return parts.hostname


def _key() -> str:
    """Return the servers' key; one from a file may have its line's end."""
    key = os.environ.get("VLLM_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable():
        raise InvalidUsageError("VLLM_API_KEY holds characters that no header can", hint="give the key alone")
    return key
