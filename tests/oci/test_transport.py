from __future__ import annotations

import json
import logging
import socket
import time
from email.utils import formatdate
from typing import TYPE_CHECKING

import httpx
import pytest

from gemma_pack.errors import AccessError, InvalidUsageError, OfflineError, RegistryError
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.retry import AnswerError
from gemma_pack.oci.transport import Timeouts, Transport
from tests.oci.faulty import Fault, Faulty, Pauses, cut_download, faulty_registry, quick, say
from tests.oci.registry import running_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SCOPES = ("repository:a/b:pull",)
MANIFEST = "/v2/a/b/manifests/1"


def error_body(code: str, message: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": message}]}).encode()


@pytest.fixture
def transport(faulty: Faulty) -> Iterator[Transport]:
    transport = Transport(parse_reference(f"{faulty.host}/a/b:1"), retry=quick())
    transport.patience.stop = Pauses()
    yield transport
    transport.close()


def get(transport: Transport, path: str = "/v2/", *, expected: tuple[int, ...] = (200,)) -> bytes:
    return transport.request("GET", transport.base.join(path), expected=expected, scopes=SCOPES).body


def pauses(transport: Transport) -> list[float]:
    assert isinstance(transport.patience.stop, Pauses)
    return transport.patience.stop.seconds


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(faulty: Faulty, transport: Transport, status: int):
    faulty.faults = [Fault("GET", "/v2/", say(status, body=b"<html>gateway</html>"), times=3)]
    get(transport)
    assert faulty.count("GET") == 4
    assert len(pauses(transport)) == 3


def test_patience_ends_with_the_registrys_status(faulty: Faulty, transport: Transport):
    faulty.faults = [Fault("GET", "/v2/", say(502, body=b"<html>\x1b[31mgateway</html>"), times=99)]
    with pytest.raises(AnswerError, match="answered 502 to /v2/") as caught:
        get(transport)
    assert faulty.count("GET") == 4
    assert not caught.value.transient
    assert "gateway" not in caught.value.message


@pytest.mark.parametrize("status", [400, 404, 409, 418])
def test_what_will_not_pass_is_not_tried_again(faulty: Faulty, transport: Transport, status: int):
    faulty.faults = [Fault("GET", "/v2/", say(status, body=error_body("BROKEN", "no\x1b[31m way")), times=9)]
    with pytest.raises(AnswerError, match=r"BROKEN no \[31m way") as caught:
        get(transport)
    assert caught.value.status == status
    assert faulty.count("GET") == 1


@pytest.mark.parametrize("as_date", [True, False])
def test_retry_after_sets_the_pause(faulty: Faulty, transport: Transport, as_date: bool):
    value = formatdate(time.time() + 100, usegmt=True) if as_date else "100"
    faulty.faults = [Fault("GET", "/v2/", say(429, {"Retry-After": value}))]
    get(transport)
    (pause,) = pauses(transport)
    assert 70 <= pause <= 100


def test_a_retry_after_beyond_patience_ends_it(faulty: Faulty, transport: Transport):
    faulty.faults = [Fault("GET", "/v2/", say(429, {"Retry-After": "86400"}))]
    with pytest.raises(AnswerError, match="429"):
        get(transport)
    assert pauses(transport) == []


def test_a_connection_that_breaks_is_tried_again(faulty: Faulty, transport: Transport):
    faulty.manifests["a/b", "1"] = ("text/plain", b"x" * 1000)
    faulty.faults = [Fault("GET", "/v2/$", lambda request: request.hang_up(), times=2)]
    get(transport)
    assert faulty.count("GET") == 3


def test_a_document_cut_in_its_body_is_fetched_again(faulty: Faulty, transport: Transport):
    digest = "sha256:" + "0" * 64
    faulty.blobs["a/b", digest] = b"x" * 1000
    faulty.faults = [Fault("GET", "blobs", cut_download(500))]
    assert get(transport, f"/v2/a/b/blobs/{digest}") == b"x" * 1000


def test_more_than_a_document_is_refused(faulty: Faulty, transport: Transport):
    faulty.manifests["a/b", "1"] = ("text/plain", bytes((4 << 20) + 1))
    with pytest.raises(RegistryError, match="more than 4 MiB"):
        get(transport, MANIFEST)


def test_silence_is_a_broken_connection(faulty: Faulty):
    faulty.faults = [Fault("GET", "/v2/", lambda _: time.sleep(0.4))]
    reference = parse_reference(f"{faulty.host}/a/b")
    transport = Transport(reference, retry=quick(), timeouts=Timeouts(silence_s=0.1))
    get(transport)
    assert faulty.count("GET") == 2
    transport.close()


def test_nobody_at_the_port_is_offline(free_port: int):
    transport = Transport(parse_reference(f"127.0.0.1:{free_port}/a/b"), retry=quick())
    transport.patience.stop = Pauses()
    with pytest.raises(OfflineError, match=rf"127\.0\.0\.1:{free_port} cannot be reached") as caught:
        get(transport)
    assert caught.value.exit_code == 14
    assert pauses(transport) == []
    transport.close()


def test_a_name_that_does_not_resolve_is_offline(monkeypatch: pytest.MonkeyPatch):
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    transport = Transport(parse_reference("registry.invalid/a/b"), retry=quick())
    with pytest.raises(OfflineError, match=r"registry\.invalid cannot be reached.*not known"):
        get(transport)
    transport.close()


def test_a_token_is_fetched_and_shown(faulty: Faulty, transport: Transport, store_login: Callable[..., None]):
    faulty.login = ("hilbert", "open sesame")
    store_login(faulty.host)
    get(transport)
    get(transport)
    assert faulty.count("GET", "/token") == 1
    assert faulty.count("GET", "/v2/") == 3


def test_a_token_that_ended_early_is_renewed_once(
    faulty: Faulty, transport: Transport, store_login: Callable[..., None]
):
    faulty.login = ("hilbert", "open sesame")
    store_login(faulty.host)
    get(transport)
    faulty.tokens.clear()
    get(transport)
    assert faulty.count("GET", "/token") == 2


def test_a_busy_token_realm_is_tried_again(faulty: Faulty, transport: Transport, store_login: Callable[..., None]):
    faulty.login = ("hilbert", "open sesame")
    store_login(faulty.host)
    faulty.faults = [Fault("GET", "/token", say(503), times=2)]
    get(transport)
    assert faulty.count("GET", "/token") == 3


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_login_command(faulty: Faulty, transport: Transport, status: int):
    faulty.faults = [Fault("GET", "/v2/", say(status, body=error_body("DENIED", "not you")), times=9)]
    with pytest.raises(AccessError, match="DENIED not you") as caught:
        get(transport)
    assert f"podman login {faulty.host}" in (caught.value.hint or "")


def test_a_wrong_password_is_an_access_error(faulty: Faulty, transport: Transport, store_login: Callable[..., None]):
    faulty.login = ("hilbert", "open sesame")
    store_login(faulty.host, "wrong word")
    with pytest.raises(AccessError) as caught:
        get(transport)
    assert "wrong word" not in str(caught.value)


def test_the_login_is_not_taken_along_to_another_host(
    faulty: Faulty, transport: Transport, store_login: Callable[..., None]
):
    faulty.login = ("hilbert", "open sesame")
    store_login(faulty.host)
    with faulty_registry() as other:
        elsewhere = f"http://{other.host}/v2/"
        get(transport)
        faulty.faults = [Fault("GET", "/v2/a", say(307, {"Location": elsewhere}))]
        assert get(transport, MANIFEST) == b""
        assert other.count("GET") == 1
        assert "authorization" not in {name.lower() for name in other.seen[0].headers}
    assert "Authorization" in faulty.seen[-1].headers


def test_redirects_in_circles_end(faulty: Faulty, transport: Transport):
    faulty.faults = [Fault("GET", "/v2/", say(302, {"Location": "/v2/"}), times=99)]
    with pytest.raises(RegistryError, match="in circles"):
        get(transport)
    assert faulty.count("GET") < 10


@pytest.mark.parametrize("location", ["", "ftp://a/", "http://a:port/"])
def test_a_redirect_to_nowhere_is_an_error(faulty: Faulty, transport: Transport, location: str):
    with pytest.raises(RegistryError, match="Location"):
        transport.resolve(httpx.URL(f"http://{faulty.host}/v2/"), location)


def test_https_does_not_lead_to_plain_http():
    transport = Transport(parse_reference("quay.io/a/b"))
    url = httpx.URL("https://quay.io/v2/")
    with pytest.raises(RegistryError, match="from https to plain http") as caught:
        transport.resolve(url, "http://quay.io/v2/a")
    assert "X-Forwarded-Proto" in (caught.value.hint or "")
    with pytest.raises(RegistryError, match="from https to plain http"):
        transport.resolve(url, "http://127.0.0.1:9200/")  # what listens on this machine is none of its business
    assert str(transport.resolve(url, "https://cdn.quay.io/x?sig=a%2Fb")) == "https://cdn.quay.io/x?sig=a%2Fb"
    transport.close()


@pytest.mark.parametrize(
    ("host", "plain_http", "scheme"),
    [
        ("quay.io", False, "https"),
        ("10.0.0.1:5000", False, "https"),
        ("10.0.0.1:5000", True, "http"),
        ("localhost:5000", False, "http"),
        ("[::1]:5000", False, "http"),
    ],
)
def test_plain_http_only_on_loopback_or_when_asked(host: str, plain_http: bool, scheme: str):
    transport = Transport(parse_reference(f"{host}/a/b"), plain_http=plain_http)
    assert transport.base.scheme == scheme
    transport.close()


def test_a_proxy_is_not_used_on_loopback(faulty: Faulty, monkeypatch: pytest.MonkeyPatch, free_port: int):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port}")
    transport = Transport(parse_reference(f"{faulty.host}/a/b"), retry=quick())
    get(transport)
    transport.close()


def test_no_proxy_sees_the_login_for_another_port_of_this_machine(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch, free_port: int, store_login: Callable[..., None]
):
    store_login(faulty.host)
    realm = {"WWW-Authenticate": f'Bearer realm="http://127.0.0.1:{free_port}/token",service="here"'}
    faulty.faults = [Fault("GET", "/v2/", say(401, realm))]
    with faulty_registry() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.host}")
        transport = Transport(parse_reference(f"{faulty.host}/a/b"), retry=quick(1))
        with pytest.raises(RegistryError, match=f"127.0.0.1:{free_port}"):
            get(transport)
        transport.close()
        assert proxy.seen == []


def test_a_proxy_is_used_elsewhere(faulty: Faulty, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://{faulty.host}")
    transport = Transport(parse_reference("registry.invalid/a/b"), plain_http=True, retry=quick())
    faulty.faults = [Fault("GET", "http://registry.invalid/v2/", say(200))]
    get(transport)
    transport.close()


@pytest.mark.parametrize("proxy", ["socks5://u:hunter2@proxy:1080", "what://u:hunter2@proxy"])
def test_a_proxy_that_is_none_is_a_usage_error_without_its_password(monkeypatch: pytest.MonkeyPatch, proxy: str):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(InvalidUsageError, match="proxy") as caught:
        Transport(parse_reference("quay.io/a/b"))
    assert "hunter2" not in f"{caught.value.message} {caught.value.hint}"


def test_nothing_secret_is_logged(
    faulty: Faulty, transport: Transport, store_login: Callable[..., None], caplog: pytest.LogCaptureFixture
):
    faulty.login = ("hilbert", "open sesame")
    store_login(faulty.host)
    with caplog.at_level(logging.DEBUG):
        get(transport)
    assert faulty.tokens
    assert "open sesame" not in caplog.text
    assert "token-0" not in caplog.text
    assert "Basic " not in caplog.text


def test_a_certificate_is_trusted_by_ca_file_or_by_ssl_cert_file_only(
    tool: Callable[[str], str], certificate: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    own, stranger = certificate("own"), certificate("stranger")
    with running_registry(tool("docker-registry"), own, "tls") as registry:
        reference = parse_reference(f"{registry.host}/a/b")
        trusting = Transport(reference, ca_file=own / "cert.pem", retry=quick())
        get(trusting)
        trusting.close()
        doubting = Transport(reference, ca_file=stranger / "cert.pem", retry=quick())
        with pytest.raises(RegistryError, match="not trusted") as caught:
            get(doubting)
        assert "--ca-file" in (caught.value.hint or "")
        doubting.close()
        monkeypatch.setenv("SSL_CERT_FILE", str(own / "cert.pem"))
        told = Transport(reference, ca_file=stranger / "cert.pem", retry=quick())
        get(told)
        told.close()


def test_a_server_without_tls_is_told_from_one_that_is_not_there(faulty: Faulty, certificate: Callable[[str], Path]):
    transport = Transport(parse_reference(f"{faulty.host}/a/b"), ca_file=certificate("own") / "cert.pem", retry=quick())
    with pytest.raises(RegistryError, match="does not speak TLS") as caught:
        get(transport)
    assert "--plain-http" in (caught.value.hint or "")
    transport.close()


@pytest.mark.parametrize("reference", ["quay.io/a/b", "127.0.0.1:5000/a/b"])
@pytest.mark.parametrize(("content", "reason"), [("not a certificate", "holds no PEM"), (None, "cannot be read: No")])
def test_an_ssl_cert_file_that_is_none_is_a_usage_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, content: str | None, reason: str
):
    path = tmp_path / "ca.pem"
    if content:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(InvalidUsageError, match=rf"SSL_CERT_FILE .*ca\.pem {reason}"):
        Transport(parse_reference(reference))


@pytest.mark.parametrize("content", ["not a certificate", None])
def test_a_ca_file_without_certificates_is_a_usage_error(tmp_path: Path, content: str | None):
    path = tmp_path / "ca.pem"
    if content:
        path.write_text(content)
    with pytest.raises(InvalidUsageError, match=r"ca\.pem"):
        Transport(parse_reference("quay.io/a/b"), ca_file=path)
