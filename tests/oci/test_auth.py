from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.errors import AccessError, RegistryError
from gemma_pack.oci.auth import Authenticator, Challenge, parse_challenges
from gemma_pack.oci.credentials import Credentials
from gemma_pack.oci.transport import Answer

if TYPE_CHECKING:
    from collections.abc import Callable

SCOPES = ("repository:team/gemma:pull,push",)
BEARER = 'Bearer realm="https://auth.example/token",service="reg"'
LOGIN = Credentials(username="hilbert", password="open sesame")


@dataclass
class Realm:
    """Gives tokens and remembers who asked."""

    lifetime_s: float | None = 300
    status: int = 200
    body: Any = None
    requests: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> Answer:
        self.requests.append(request)
        body = self.body
        if body is None:
            body = {"token": f"t{len(self.requests)}"} | ({"expires_in": self.lifetime_s} if self.lifetime_s else {})
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Answer(status=self.status, headers=httpx.Headers(), body=data, url=request.url)


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def authenticator(
    realm: Realm,
    login: Credentials | None = LOGIN,
    clock: Callable[[], float] | None = None,
    *,
    host: str = "quay.io",
    plain_http: bool = False,
) -> Authenticator:
    return Authenticator(host, send=realm, find_login=lambda: login, plain_http=plain_http, clock=clock or Clock())


def test_challenges_are_read_with_their_parameters():
    header = 'Basic realm="a \\"b\\"", Bearer realm="https://x/t",service=s,scope="repository:a:pull,push"'
    assert parse_challenges(header) == [
        Challenge("basic", {"realm": 'a "b"'}),
        Challenge("bearer", {"realm": "https://x/t", "service": "s", "scope": "repository:a:pull,push"}),
    ]


@given(st.text(max_size=80) | st.text('Bearer Basic realm="=,\\ ', max_size=60))
def test_any_header_is_read_without_an_error(header: str):
    for challenge in parse_challenges(header):
        assert challenge.scheme


def test_nothing_is_shown_before_a_challenge():
    realm = Realm()
    assert authenticator(realm).header(SCOPES) is None
    assert realm.requests == []


def test_a_token_is_fetched_for_the_scopes_with_the_login_and_kept():
    realm = Realm()
    auth = authenticator(realm)
    assert auth.refused(BEARER, SCOPES, None)
    assert auth.header(SCOPES) == "Bearer t1"
    assert auth.header(SCOPES) == "Bearer t1"
    mount = (*SCOPES, "repository:team/base:pull")
    assert auth.header(mount) == "Bearer t2"
    assert auth.header(SCOPES) == "Bearer t1"
    first, second = realm.requests
    assert str(first.url) == ("https://auth.example/token?scope=repository%3Ateam%2Fgemma%3Apull%2Cpush&service=reg")
    assert first.headers["Authorization"] == LOGIN.basic
    assert second.url.params.get_list("scope") == list(mount)


def test_a_realm_keeps_its_own_query():
    realm = Realm()
    auth = authenticator(realm)
    auth.refused('Bearer realm="https://auth.example/token?tenant=a",service="reg"', SCOPES, None)
    auth.header(SCOPES)
    assert realm.requests[0].url.params["tenant"] == "a"


def test_without_a_login_an_anonymous_token_is_fetched():
    realm = Realm()
    auth = authenticator(realm, None)
    auth.refused(BEARER, SCOPES, None)
    assert auth.header(SCOPES) == "Bearer t1"
    assert "Authorization" not in realm.requests[0].headers


def test_an_identity_token_is_exchanged_by_post():
    realm = Realm(body={"access_token": "acc"})
    auth = authenticator(realm, Credentials(identity_token="refresh-me"))
    auth.refused(BEARER, SCOPES, None)
    assert auth.header(SCOPES) == "Bearer acc"
    form = httpx.QueryParams(realm.requests[0].content.decode())
    assert realm.requests[0].method == "POST"
    assert form["grant_type"] == "refresh_token"
    assert form["refresh_token"] == "refresh-me"
    assert form["scope"] == SCOPES[0]


def test_a_token_is_renewed_before_it_ends_and_for_a_closing_request_earlier():
    realm, clock = Realm(lifetime_s=300), Clock()
    auth = authenticator(realm, clock=clock)
    auth.refused(BEARER, SCOPES, None)
    auth.header(SCOPES)
    clock.now_s = 250
    assert auth.header(SCOPES) == "Bearer t1"
    assert auth.header(SCOPES, fresh_for_s=60) == "Bearer t2"
    clock.now_s = 250 + 297
    assert auth.header(SCOPES) == "Bearer t3"


def test_a_token_without_a_lifetime_lasts_a_minute():
    realm, clock = Realm(lifetime_s=None), Clock()
    auth = authenticator(realm, clock=clock)
    auth.refused(BEARER, SCOPES, None)
    auth.header(SCOPES)
    clock.now_s = 50
    assert auth.header(SCOPES) == "Bearer t1"
    clock.now_s = 56
    assert auth.header(SCOPES) == "Bearer t2"


def test_a_refused_token_is_dropped_but_not_another_threads_newer_one():
    realm = Realm()
    auth = authenticator(realm)
    auth.refused(BEARER, SCOPES, None)
    old = auth.header(SCOPES)
    assert auth.refused(BEARER, SCOPES, old)
    assert auth.header(SCOPES) == "Bearer t2"
    assert auth.refused(BEARER, SCOPES, old)
    assert auth.header(SCOPES) == "Bearer t2"


def test_basic_shows_the_login_and_does_not_insist():
    auth = authenticator(Realm())
    assert auth.refused('Basic realm="r"', SCOPES, None)
    assert auth.header(SCOPES) == LOGIN.basic
    assert not auth.refused('Basic realm="r"', SCOPES, LOGIN.basic)


def test_bearer_is_preferred_to_basic():
    auth = authenticator(Realm())
    auth.refused(f'Basic realm="r", {BEARER}', SCOPES, None)
    assert auth.header(SCOPES) == "Bearer t1"


def test_basic_without_a_login_says_how_to_log_in():
    auth = authenticator(Realm(), None)
    auth.refused('Basic realm="r"', SCOPES, None)
    with pytest.raises(AccessError) as caught:
        auth.header(SCOPES)
    assert caught.value.exit_code == 13
    assert "podman login quay.io" in (caught.value.hint or "")


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_realm_that_refuses_the_login_says_how_to_log_in(status: int):
    auth = authenticator(Realm(status=status))
    auth.refused(BEARER, SCOPES, None)
    with pytest.raises(AccessError, match="gives no token") as caught:
        auth.header(SCOPES)
    assert "open sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", {}, {"token": 7}, {"token": "a\r\nb"}, {"token": "t", "expires_in": {"s": 1}}]
)
def test_a_realm_that_answers_nonsense_is_an_error(body: Any):
    auth = authenticator(Realm(body=body))
    auth.refused(BEARER, SCOPES, None)
    with pytest.raises(RegistryError):
        auth.header(SCOPES)


@pytest.mark.parametrize(
    "realm",
    [
        "http://auth.example/token", "ftp://auth.example/", "", "/token", "http://[", "http://127.0.0.1:1/token",
        "http://localhost/token",
    ],
)  # fmt: skip
def test_the_login_goes_nowhere_unencrypted(realm: str):
    requests = Realm()
    auth = authenticator(requests)
    auth.refused(f'Bearer realm="{realm}"', SCOPES, None)
    with pytest.raises(RegistryError):
        auth.header(SCOPES)
    assert requests.requests == []


def test_plain_http_is_fine_on_loopback_and_for_a_host_that_was_asked_for_so():
    loopback = authenticator(Realm(), host="127.0.0.1:5000")
    loopback.refused('Bearer realm="http://127.0.0.1:5001/token"', SCOPES, None)
    assert loopback.header(SCOPES) == "Bearer t1"
    asked = authenticator(Realm(), host="10.0.0.5:5000", plain_http=True)
    asked.refused('Bearer realm="http://10.0.0.5:5000/token"', SCOPES, None)
    assert asked.header(SCOPES) == "Bearer t1"
    elsewhere = authenticator(Realm(), host="10.0.0.5:5000", plain_http=True)
    elsewhere.refused('Bearer realm="http://10.0.0.6:5000/token"', SCOPES, None)
    with pytest.raises(RegistryError, match="not encrypted"):
        elsewhere.header(SCOPES)
