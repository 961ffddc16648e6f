"""HTTP to one registry: who may see the login, what is tried again, and which sentence an error becomes.

Plain HTTP only on this machine or when asked for. The Authorization header goes to the registry's own origin
and nowhere else, whatever a Location says, and no other origin may say where a login is turned into a token. What a
registry or a proxy may do for a moment (408, 429, 5xx, a lost connection) is tried again after growing, jittered
pauses, or the pause that Retry-After asks for; a host that never answered is not.
"""

from __future__ import annotations

import email.utils
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import httpx

from gemma_pack import __version__
from gemma_pack.errors import InvalidUsageError, OfflineError, RegistryError
from gemma_pack.oci.auth import Authenticator, Scopes, login_error
from gemma_pack.oci.credentials import find_credentials
from gemma_pack.oci.manifest import MAX_DOCUMENT_BYTES
from gemma_pack.oci.reference import is_loopback
from gemma_pack.oci.retry import TRANSIENT, AnswerError, Patience, Retry
from gemma_pack.oci.tls import named_context, tls_error, trust, unreachable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from gemma_pack.oci.reference import Reference

MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds of silence after which a connection counts as broken."""

    connect_s: float = 10.0
    silence_s: float = 60.0
    """While bytes move, in either direction."""
    document_s: float = 120.0
    """For the body of a document, 4 MiB at most, to arrive."""
    commit_s: float = 900.0
    """After the last byte of a blob: registries hash and copy many gigabytes before they answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response whose body, at most 4 MiB, was read."""

    status: int
    headers: httpx.Headers = field(repr=False)
    body: bytes = field(repr=False)
    url: httpx.URL


class Transport:
    """Sends requests to one registry, for the scopes that each of them needs. Threads may share it."""

    def __init__(
        self,
        reference: Reference,
        *,
        plain_http: bool = False,
        ca_file: Path | None = None,
        retry: Retry | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        """Prepare to speak to the registry of `reference`; nothing is sent yet.

        Args:
            reference: names the registry, and the repository whose login is looked up.
            plain_http: speak HTTP without TLS. On loopback that is the default, unless `ca_file` is given.
            ca_file: PEM certificates to trust besides those of the system.
            retry: patience with a registry that fails for a moment.
            timeouts: when silence counts as failure.

        Raises:
            InvalidUsageError: `ca_file` or SSL_CERT_FILE holds no certificate, or a proxy variable no proxy.
        """
        self.host = reference.host
        self.patience = Patience(retry)
        self.timeouts = timeouts or Timeouts()
        plain = plain_http or (reference.is_loopback and ca_file is None)
        self.base = httpx.URL(f"{'http' if plain else 'https'}://{reference.api_host}")
        connect = partial(
            httpx.Client,
            verify=named_context() if plain and ca_file is None else trust(ca_file),
            headers={"User-Agent": f"gemma-pack/{__version__}", "Accept-Encoding": "identity"},
            limits=httpx.Limits(max_connections=None),
        )
        try:
            self._http = connect()
            # no proxy reaches this machine's own loopback, and none is to see the login for what listens there
            self._direct = connect(trust_env=False) if reference.is_loopback else self._http
        except (ImportError, ValueError, httpx.InvalidURL) as error:  # its text may hold the proxy's password
            raise InvalidUsageError(
                "a proxy that the environment names cannot be used",
                hint="HTTPS_PROXY, HTTP_PROXY or ALL_PROXY must be http://host:port; SOCKS is not supported; NO_PROXY "
                "must be hosts with commas between them",
            ) from error
        self._auth = Authenticator(
            self.host,
            send=self._ask_realm,
            find_login=lambda: find_credentials(reference),
            plain_http=plain_http,
        )
        self._reached = False

    def close(self) -> None:
        """End all waiting and close all connections."""
        self.patience.stop.set()
        self._http.close()
        self._direct.close()

    def request(
        self,
        method: str,
        url: httpx.URL,
        *,
        expected: Collection[int],
        scopes: Scopes = (),
        headers: Mapping[str, str] | None = None,
        content: bytes = b"",
        fresh_for_s: float = 0.0,
        patient: bool = False,
    ) -> Answer:
        """Send a request that may be repeated, and return an answer whose status is one of `expected`.

        `fresh_for_s` is for how long the token must still be valid; `patient` waits long enough for a commit.

        Raises:
            AnswerError: the registry answered otherwise, at last.
            AccessError: it wants another login.
            OfflineError: it cannot be reached.
        """

        def once() -> Answer:
            response = self._authorized(
                method,
                url,
                scopes=scopes,
                headers=headers or {},
                content=content,
                fresh_for_s=fresh_for_s,
                read_s=self.timeouts.commit_s if patient else self.timeouts.silence_s,
            )
            return self._checked(self._read(response), expected)

        return self.patience.run(once)

    def upload(
        self,
        method: str,
        url: httpx.URL,
        body: Iterable[bytes],
        *,
        size_bytes: int,
        expected: Collection[int],
        scopes: Scopes,
        headers: Mapping[str, str],
        fresh_for_s: float = 0.0,
    ) -> Answer:
        """Send `size_bytes` of a body that can be read only once; the caller decides about another try.

        Raises:
            AnswerError: the connection broke (status 0), or the registry answered otherwise. A status of 401
                means that the token ended on the way; the next request shows a new one.
        """
        shown = self._authorization(url, scopes, fresh_for_s)
        request = self._http.build_request(
            method,
            url,
            content=body,
            headers={**headers, **_authorization_header(shown), "Content-Length": str(size_bytes)},
            timeout=self._timeout(self.timeouts.commit_s),
        )
        answer = self._read(self._exchange(request))
        challenge = answer.headers.get("www-authenticate", "")
        if answer.status == 401 and self._is_own(url) and self._auth.refused(challenge, scopes, shown):
            raise AnswerError(f"{self.host} let the login expire in mid-upload", status=401)
        return self._checked(answer, expected)

    @contextmanager
    def stream(
        self, url: httpx.URL, *, expected: Collection[int], scopes: Scopes, headers: Mapping[str, str]
    ) -> Iterator[httpx.Response]:
        """Open a GET whose body the caller reads; an error while reading it is the caller's to turn, by `broken`."""

        def once() -> httpx.Response:
            response = self._authorized("GET", url, scopes=scopes, headers=headers, read_s=self.timeouts.silence_s)
            if response.status_code not in expected:
                self._checked(self._read(response), expected)
            return response

        response = self.patience.run(once)
        try:
            yield response
        finally:
            response.close()

    def broken(self, error: httpx.TransportError) -> AnswerError:
        """Return the error that a connection lost in mid-body becomes."""
        host = error.request.url.netloc.decode()
        return AnswerError(f"the connection to {host} broke: {str(error) or type(error).__name__}")

    def _ask_realm(self, request: httpx.Request) -> Answer:
        def once() -> Answer:
            answer = self._read(self._exchange(request))
            return self._checked(answer, () if answer.status in TRANSIENT else (answer.status,))

        return self.patience.run(once)

    def _authorized(
        self,
        method: str,
        url: httpx.URL,
        *,
        scopes: Scopes,
        headers: Mapping[str, str],
        read_s: float,
        content: bytes = b"",
        fresh_for_s: float = 0.0,
    ) -> httpx.Response:
        """Send a request, once more if a new token may help, and follow redirects of reading requests."""
        renewed = False
        for _ in range(MAX_REDIRECTS + 2):
            shown = self._authorization(url, scopes, fresh_for_s)
            request = self._http.build_request(
                method,
                url,
                content=content,
                headers={**headers, **_authorization_header(shown)},
                timeout=self._timeout(read_s),
            )
            response = self._exchange(request)
            if response.status_code == 401 and not renewed and self._is_own(url):
                challenge = response.headers.get("www-authenticate", "")
                if self._auth.refused(challenge, scopes, shown):
                    self._read(response)
                    renewed = True
                    continue
            if response.status_code not in _REDIRECTS or method not in {"GET", "HEAD"}:
                return response
            url = self.resolve(url, response.headers.get("location", ""))
            self._read(response)
        raise RegistryError(f"{self.host} redirects in circles")

    def resolve(self, url: httpx.URL, location: str) -> httpx.URL:
        """Return where a Location, relative or not, in the answer to `url` leads.

        Raises:
            RegistryError: there is none, or it leads from https to plain http.
        """
        try:
            target = url.join(location)
        except (httpx.InvalidURL, ValueError) as error:
            raise RegistryError(f"{self.host} sent a broken Location header") from error
        if not location or target.scheme not in {"http", "https"} or not target.host:
            raise RegistryError(f"{self.host} sent no usable Location header")
        if url.scheme == "https" and target.scheme == "http":
            raise RegistryError(
                f"{self.host} leads from https to plain http at {target.host}",
                hint="a proxy in front of it must pass on X-Forwarded-Proto: https",
            )
        return target

    def _authorization(self, url: httpx.URL, scopes: Scopes, fresh_for_s: float) -> str | None:
        return self._auth.header(scopes, fresh_for_s) if scopes and self._is_own(url) else None

    def _is_own(self, url: httpx.URL) -> bool:
        return (url.scheme, url.netloc) == (self.base.scheme, self.base.netloc)

    def _timeout(self, read_s: float) -> httpx.Timeout:
        times = self.timeouts
        return httpx.Timeout(connect=times.connect_s, read=read_s, write=times.silence_s, pool=None)

    def _exchange(self, request: httpx.Request) -> httpx.Response:
        """Send one request and return the response with its body unread."""
        try:
            client = self._direct if is_loopback(request.url.host) else self._http
            response = client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if self._reached and tls_error(error) is None:
                raise self.broken(error) from error
            raise unreachable(request.url, error) from error
        except httpx.ProxyError as error:
            raise OfflineError(f"the proxy refused the way to {request.url.host}: {error}") from error
        except httpx.TransportError as error:
            raise self.broken(error) from error
        self._reached = True
        return response

    def _read(self, response: httpx.Response) -> Answer:
        body = bytearray()
        begin_s = time.monotonic()
        try:
            for piece in response.iter_bytes():
                body += piece
                if time.monotonic() - begin_s > self.timeouts.document_s:  # a trickle is never silent
                    raise AnswerError(f"{self.host} sent {len(body)} bytes in {self.timeouts.document_s:.0f} s")
                if len(body) > MAX_DOCUMENT_BYTES:
                    raise RegistryError(f"{self.host} answered with more than 4 MiB where a document was expected")
        except httpx.TransportError as error:
            raise self.broken(error) from error
        except httpx.DecodingError as error:
            raise RegistryError(f"{self.host} sent an answer that does not decode") from error
        finally:
            response.close()
        url = response.request.url
        return Answer(status=response.status_code, headers=response.headers, body=bytes(body), url=url)

    def _checked(self, answer: Answer, expected: Collection[int]) -> Answer:
        if answer.status in expected:
            return answer
        reason = _reason(answer)
        if answer.status == 401:
            raise login_error(self.host, f"{self.host} wants a login for this{reason}")
        if answer.status == 403 and self._is_own(answer.url):
            raise login_error(self.host, f"{self.host} does not allow this{reason}")
        raise AnswerError(
            f"{answer.url.host} answered {answer.status} to {answer.url.path}{reason}",
            status=answer.status,
            retry_after_s=_retry_after_s(answer.headers.get("retry-after", "")),
        )


def _authorization_header(shown: str | None) -> dict[str, str]:
    return {"Authorization": shown} if shown else {}


def _reason(answer: Answer) -> str:
    """Return ": " and what a distribution error body says, cleaned of what a terminal would obey; "" for others.

    The format is `{"errors": [{"code": …, "message": …}]}` (distribution-spec, "Error Codes").
    """
    try:
        errors: list[Any] = json.loads(answer.body)["errors"]
        parts = [f"{error.get('code', '')} {error.get('message', '')}".strip() for error in errors]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    text = "".join(c if c.isprintable() else " " for c in "; ".join(parts))
    return f": {text[:300]}" if text else ""


def _retry_after_s(value: str) -> float | None:
    """Read Retry-After: seconds, or a date (RFC 9110, 10.2.3)."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
