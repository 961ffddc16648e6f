"""How a registry is shown who asks: the challenge it sends, and the token that answers it.

A registry refuses with `WWW-Authenticate: Bearer realm=…,service=…,scope=…` (or Basic); the client fetches a
short-lived token for the scope from the realm and shows that. Tokens are kept by scope until they are about to expire.
The login goes to the realm alone, over https unless both are on this machine.

Sources: https://distribution.github.io/distribution/spec/auth/token/ and .../oauth/; RFC 9110, 11.6.1.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import httpx

from gemma_pack.errors import AccessError, RegistryError
from gemma_pack.oci.reference import is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gemma_pack.oci.credentials import Credentials
    from gemma_pack.oci.transport import Answer

Scopes = tuple[str, ...]
"""What is asked for, such as `repository:team/gemma:pull,push`; with a mount also the repository mounted from."""

DEFAULT_LIFETIME_S: Final = 60.0
"""Of a token that does not say, by the token specification."""
_SLACK_S: Final = 5.0
"""A token this near its end counts as expired: it must still be valid when the request arrives."""
_PART: Final = re.compile(
    r'[\s,]*(?:(?P<key>[\w-]+)\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>[^\s,"]+))|(?P<scheme>[A-Za-z][\w-]*))'
)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One scheme of a WWW-Authenticate header, in lower case, with its parameters."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """Return the challenges of a WWW-Authenticate header; what does not follow the grammar is passed over."""
    challenges: list[Challenge] = []
    parameters: dict[str, str] = {}
    for part in _PART.finditer(header):
        if part["scheme"]:
            parameters = {}
            challenges.append(Challenge(part["scheme"].lower(), parameters))
        else:
            quoted = part["quoted"]
            parameters[part["key"].lower()] = part["bare"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
    return challenges


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    expires_at_s: float


class Authenticator:
    """Holds one registry's challenge and the tokens that answer it. Several threads may ask at once."""

    def __init__(
        self,
        host: str,
        *,
        send: Callable[[httpx.Request], Answer],
        find_login: Callable[[], Credentials | None],
        plain_http: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare for `host`.

        Args:
            host: the registry as the user named it, with its port.
            send: sends a request to a realm and returns the answer.
            find_login: called once, when the registry wants to know who asks.
            plain_http: the user asked for plain HTTP to this host, so its own realm may be plain too.
            clock: seconds, for the tokens' lifetimes.
        """
        self._host = host
        self._send = send
        self._find_login = find_login
        self._plain_http = plain_http
        self._clock = clock
        self._lock = threading.Lock()
        self._challenge: Challenge | None = None
        self._tokens: dict[Scopes, _Token] = {}
        self._login: Credentials | None = None
        self._login_sought = False

    def header(self, scopes: Scopes, fresh_for_s: float = 0.0) -> str | None:
        """Return the Authorization value for `scopes`, valid for at least `fresh_for_s` more; None before a challenge.

        A token that the realm makes shorter than `fresh_for_s` is fetched anew each time.
        """
        with self._lock:
            if self._challenge is None:
                return None
            if self._challenge.scheme == "basic":
                return self._require_login().basic
            token = self._tokens.get(scopes)
            if token is None or token.expires_at_s - self._clock() < max(fresh_for_s, _SLACK_S):
                token = self._tokens[scopes] = self._fetch(self._challenge, scopes)
            return f"Bearer {token.value}"

    def refused(self, header: str, scopes: Scopes, shown: str | None) -> bool:
        """Learn from a 401 to a request that showed `shown`; tell whether another try with a new answer makes sense."""
        challenges = {challenge.scheme: challenge for challenge in parse_challenges(header)}
        challenge = challenges.get("bearer") or challenges.get("basic")
        if challenge is None:
            return False
        with self._lock:
            token = self._tokens.get(scopes)
            if token and shown == f"Bearer {token.value}":
                del self._tokens[scopes]  # another thread may have a newer one by now; that one stays
            first = self._challenge is None
            self._challenge = challenge
        return first or shown is None or challenge.scheme == "bearer"

    def _fetch(self, challenge: Challenge, scopes: Scopes) -> _Token:
        request = self._token_request(challenge, scopes)
        now_s = self._clock()
        answer = self._send(request)
        if answer.status in (400, 401, 403):
            raise login_error(self._host, f"{request.url.host} gives no token for {' '.join(scopes)}")
        if answer.status != 200:
            raise RegistryError(f"{request.url.host} answered {answer.status} when asked for a token")
        try:
            document = json.loads(answer.body)
            value = document.get("token") or document["access_token"]
            lifetime_s = float(document.get("expires_in") or DEFAULT_LIFETIME_S)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RegistryError(f"{request.url.host} answered a request for a token with something else") from error
        if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]+", value):
            raise RegistryError(f"{request.url.host} gave a token that no header can carry")
        return _Token(value, now_s + lifetime_s)

    def _token_request(self, challenge: Challenge, scopes: Scopes) -> httpx.Request:
        realm = self._checked_realm(challenge.parameters.get("realm", ""))
        service = challenge.parameters.get("service", "")
        login = self._seek_login()
        if login and login.identity_token:
            form = {
                "grant_type": "refresh_token",
                "client_id": "gemma-pack",
                "service": service,
                "scope": " ".join(scopes),
                "refresh_token": login.identity_token,
            }
            return httpx.Request("POST", realm, data=form)
        parameters = realm.params.merge({"scope": list(scopes)} | ({"service": service} if service else {}))
        headers = {"Authorization": login.basic} if login else {}
        return httpx.Request("GET", realm.copy_with(query=None), params=parameters, headers=headers)

    def _checked_realm(self, text: str) -> httpx.URL:
        try:
            realm = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise RegistryError(f"{self._host} names a broken URL to fetch tokens from") from error
        host = httpx.URL(f"http://{self._host}").host
        own = self._plain_http and realm.host == host
        local = is_loopback(host) and is_loopback(realm.host)  # no registry elsewhere knows what listens here
        if realm.scheme == "https" or (realm.scheme == "http" and (own or local)):
            return realm
        raise RegistryError(
            f"{self._host} wants the login sent to {realm.scheme or 'no'}://{realm.host}, which is not encrypted",
            hint="ask its administrator for a token realm with https",
        )

    def _require_login(self) -> Credentials:
        login = self._seek_login()
        if login is None or not login.username:
            raise login_error(self._host, f"{self._host} wants a login, and none is stored")
        return login

    def _seek_login(self) -> Credentials | None:
        if not self._login_sought:
            self._login, self._login_sought = self._find_login(), True
        return self._login


def login_error(host: str, message: str) -> AccessError:
    """Return the error that tells how to log in to `host`."""
    return AccessError(
        message, hint=f"podman login {host} stores a login; REGISTRY_AUTH_FILE names the file to read it from"
    )
