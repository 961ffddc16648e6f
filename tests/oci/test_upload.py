from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from gemma_pack.errors import AccessError, RegistryError
from gemma_pack.oci.body import Blob
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.journal import PushJournal
from gemma_pack.oci.manifest import sha256_digest
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.retry import AnswerError
from gemma_pack.oci.upload import Uploader
from tests.oci.faulty import Fault, Faulty, Handler, cut_upload, faulty_registry, quick, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
SIZE = 3 * MIB
DATA = random.Random(0).randbytes(SIZE)  # noqa: S311 - test data
DIGEST = sha256_digest(DATA)


def blob(data: bytes = DATA, digest_of: bytes | None = None, *, hashed: bool = True) -> Blob:
    def read() -> Iterator[bytes]:
        return (data[first : first + MIB] for first in range(0, len(data), MIB))

    promised = data if digest_of is None else digest_of
    digest = sha256_digest(promised) if hashed else None
    return Blob(size_bytes=len(promised), digest=digest, read=read, label="the weights", key="weights")


@pytest.fixture
def client(faulty: Faulty) -> Iterator[RegistryClient]:
    with RegistryClient(parse_reference(f"{faulty.host}/a/b:1"), writable=True, retry=quick()) as client:
        yield client


class Bytes:
    """What an uploader says that it moved."""

    def __init__(self) -> None:
        self.total = 0.0
        self.back = 0.0

    def __call__(self, amount: float) -> None:
        self.total += amount
        self.back -= min(0.0, amount)


@pytest.fixture
def moved() -> Bytes:
    return Bytes()


@pytest.fixture
def uploader(client: RegistryClient, moved: Bytes) -> Uploader:
    return Uploader(client, advance=moved, chunk_bytes=MIB)


def assert_whole(faulty: Faulty, moved: Bytes) -> None:
    assert faulty.blobs["a/b", DIGEST] == DATA
    assert moved.total == SIZE


def test_one_stream_and_a_closing_put(faulty: Faulty, uploader: Uploader, moved: Bytes):
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)
    assert [seen.method for seen in faulty.seen] == ["HEAD", "POST", "PATCH", "PUT"]
    assert faulty.seen[2].headers["Content-Length"] == str(SIZE)
    assert "Transfer-Encoding" not in faulty.seen[2].headers
    assert "Content-Range" not in faulty.seen[2].headers


def test_a_blob_that_nobody_has_read_is_read_once_and_named_in_the_closing_put(
    faulty: Faulty, uploader: Uploader, moved: Bytes
):
    unread = blob(hashed=False)
    reads: list[int] = []

    def read() -> Iterator[bytes]:
        reads.append(1)
        return unread.read()

    assert uploader.stream(replace(unread, read=read)) == DIGEST
    assert_whole(faulty, moved)
    assert [seen.method for seen in faulty.seen] == ["POST", "PATCH", "PUT"]
    assert len(reads) == 1


@pytest.mark.parametrize("after", [0, 1, 65536, 2 * MIB + 12345, SIZE - 1, SIZE])
@pytest.mark.parametrize("keep", [True, False])
def test_an_unread_blob_survives_a_cut_anywhere(
    faulty: Faulty, uploader: Uploader, moved: Bytes, after: int, keep: bool
):
    faulty.faults = [Fault("PATCH", "", cut_upload(after, keep=keep))]
    assert uploader.stream(blob(hashed=False)) == DIGEST
    assert_whole(faulty, moved)


def test_a_registry_that_wants_one_put_gets_an_unread_blob_after_it_was_hashed(
    faulty: Faulty, uploader: Uploader, moved: Bytes
):
    uploader.mode = "monolithic"
    assert uploader.stream(blob(hashed=False)) == DIGEST
    assert_whole(faulty, moved)
    assert faulty.count("PATCH") == 0


class Killed(BaseException):
    """What ends a process, as far as the code below it can tell."""


def send(uploader: Uploader, blob: Blob) -> str:
    """Bring a blob the way that fits what is known of it, and return its digest."""
    if blob.digest is None:
        return uploader.stream(blob)
    assert uploader.bring(blob) == "uploaded"
    return blob.digest


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("after", [1, 65536, 2 * MIB + 12345, SIZE - 1])
def test_another_process_goes_on_in_the_session_of_a_killed_one(
    faulty: Faulty, client: RegistryClient, moved: Bytes, hashed: bool, after: int, tmp_path: Path
):
    def die() -> Iterator[bytes]:
        yield DATA[:after]
        raise Killed

    wanted = blob(hashed=hashed)
    with PushJournal.beside(tmp_path / "model", "a/b") as journal, pytest.raises(Killed):
        send(Uploader(client, journal=journal), replace(wanted, read=die))
    deadline_s = time.monotonic() + 10
    while len(faulty.sessions["session-0"]) < after and time.monotonic() < deadline_s:
        time.sleep(0.01)  # the registry is still taking what was sent
    sent = len(faulty.seen)
    with PushJournal.beside(tmp_path / "model", "a/b") as journal:
        assert send(Uploader(client, journal=journal, advance=moved), wanted) == DIGEST
        assert journal.session("weights") is None
    assert_whole(faulty, moved)
    later = [seen.headers for seen in faulty.seen[sent:] if seen.method == "PATCH"]
    if after > 1:  # a Range of 0-0 is what registries say for none
        assert [headers["Content-Range"] for headers in later] == [f"{after}-{SIZE - 1}"]


@pytest.mark.parametrize("hashed", [True, False])
def test_another_process_closes_the_session_that_a_killed_one_filled(
    faulty: Faulty, client: RegistryClient, moved: Bytes, hashed: bool, tmp_path: Path
):
    faulty.faults = [Fault("PUT", "", say(500), times=99)]
    with PushJournal.beside(tmp_path / "model", "a/b") as journal, pytest.raises(AnswerError):
        send(Uploader(client, journal=journal), blob(hashed=hashed))
    faulty.faults = []
    with PushJournal.beside(tmp_path / "model", "a/b") as journal:
        assert journal.digest("weights") == (None if hashed else DIGEST)  # never read again to be hashed
        assert send(Uploader(client, journal=journal, advance=moved), blob(hashed=hashed)) == DIGEST
    assert_whole(faulty, moved)
    assert faulty.count("PATCH") == 1


@pytest.mark.parametrize("status", [400, 403, 404, 405, 416])
def test_a_session_that_the_registry_forgot_is_begun_again(
    faulty: Faulty, client: RegistryClient, moved: Bytes, status: int
):
    journal = PushJournal("a/b")
    journal.keep_session("weights", f"http://{faulty.host}/v2/a/b/blobs/uploads/gone")
    faulty.faults = [Fault("GET", "uploads", say(status), times=99)]
    assert Uploader(client, journal=journal, advance=moved).bring(blob()) == "uploaded"
    assert_whole(faulty, moved)
    assert journal.session("weights") is None


def test_a_session_that_holds_other_bytes_is_begun_again(faulty: Faulty, client: RegistryClient, moved: Bytes):
    faulty.sessions["theirs"] = bytearray(b"something else entirely")
    journal = PushJournal("a/b")
    journal.keep_session("weights", f"http://{faulty.host}/v2/a/b/blobs/uploads/theirs")
    assert Uploader(client, journal=journal, advance=moved).stream(blob(hashed=False)) == DIGEST
    assert_whole(faulty, moved)


def test_what_is_there_is_not_sent(faulty: Faulty, uploader: Uploader, moved: Bytes):
    faulty.blobs["a/b", DIGEST] = DATA
    assert uploader.bring(blob()) == "existed"
    assert moved.total == SIZE
    assert [seen.method for seen in faulty.seen] == ["HEAD"]


def test_a_blob_of_the_wrong_size_is_not_taken_for_ours(faulty: Faulty, uploader: Uploader, moved: Bytes):
    faulty.blobs["a/b", DIGEST] = DATA[:100]
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)


def test_a_blob_of_another_repository_is_mounted(faulty: Faulty, client: RegistryClient, moved: Bytes):
    faulty.blobs["c/d", DIGEST] = DATA
    assert Uploader(client, mount_from=["x/y", "c/d"], advance=moved).bring(blob()) == "mounted"
    assert_whole(faulty, moved)
    assert faulty.count("PATCH") == 0
    assert faulty.count("DELETE") == 1  # the session that came instead of the first mount


def test_a_session_in_place_of_a_mount_is_used(faulty: Faulty, client: RegistryClient, moved: Bytes):
    assert Uploader(client, mount_from=["c/d"], advance=moved).bring(blob()) == "uploaded"
    assert_whole(faulty, moved)
    assert faulty.count("POST") == 1


def test_a_repository_that_may_not_be_read_is_no_obstacle(faulty: Faulty, client: RegistryClient, moved: Bytes):
    faulty.faults = [Fault("POST", "mount=", say(403))]
    assert Uploader(client, mount_from=["secret/d"], advance=moved).bring(blob()) == "uploaded"
    assert_whole(faulty, moved)


@pytest.mark.parametrize("status", [400, 404, 405, 501])
def test_a_registry_that_mounts_nothing_is_no_obstacle(
    faulty: Faulty, client: RegistryClient, moved: Bytes, status: int
):
    faulty.faults = [Fault("POST", "mount=", say(status))]
    assert Uploader(client, mount_from=["c/d"], advance=moved).bring(blob()) == "uploaded"
    assert_whole(faulty, moved)


@pytest.mark.parametrize(
    ("host", "mode"),
    [
        ("ghcr.io", "monolithic"),
        ("gcr.io", "monolithic"),
        ("eu.gcr.io", "monolithic"),
        ("europe-west4-docker.pkg.dev", "monolithic"),
        ("123456789012.dkr.ecr.eu-central-1.amazonaws.com", "monolithic"),
        ("public.ecr.aws", "monolithic"),
        ("quay.io", "stream"),
        ("notghcr.io", "stream"),
        ("docker.io", "stream"),
    ],
)
def test_some_hosts_are_known_to_want_one_put(host: str, mode: str):
    with RegistryClient(parse_reference(f"{host}/a/b"), writable=True) as client:
        assert Uploader(client).mode == mode


@pytest.mark.parametrize("status", [400, 405, 411, 415, 416, 501])
def test_a_registry_that_refuses_patch_gets_one_put_and_is_remembered(
    faulty: Faulty, uploader: Uploader, moved: Bytes, status: int
):
    faulty.faults = [Fault("PATCH", "", say(status), times=99)]
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)
    uploader.bring(blob(b"another"))
    assert faulty.count("PATCH") == 1


def test_a_proxy_that_caps_requests_gets_chunks_and_is_remembered(faulty: Faulty, uploader: Uploader, moved: Bytes):
    def cap(request: Handler) -> None:
        size = int(request.headers["Content-Length"])
        if size > MIB:
            say(413)(request)
        else:
            request._route(request.path.partition("?")[0], {})

    faulty.faults = [Fault("PATCH", "", cap, times=99)]
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)
    assert faulty.count("PATCH") == 1 + 3
    assert uploader.mode == "chunked"
    assert faulty.seen[-2].headers["Content-Range"] == f"{2 * MIB}-{SIZE - 1}"


def test_a_registry_that_refuses_everything_is_an_error(faulty: Faulty, uploader: Uploader):
    faulty.faults = [Fault("PATCH", "", say(405), times=99), Fault("PUT", "", say(405), times=99)]
    with pytest.raises(AnswerError, match="405"):
        uploader.bring(blob())
    assert faulty.blobs == {}


@pytest.mark.parametrize("after", [0, 1, 65536, 2 * MIB + 12345, SIZE - 1, SIZE])
@pytest.mark.parametrize("keep", [True, False])
def test_a_stream_cut_anywhere_goes_on_or_starts_again(
    faulty: Faulty, uploader: Uploader, moved: Bytes, after: int, keep: bool
):
    faulty.faults = [Fault("PATCH", "", cut_upload(after, keep=keep))]
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)
    resumed = keep and after > 1
    assert faulty.count("POST") == (1 if resumed else 2)
    if resumed and after < SIZE:
        assert faulty.seen[4].headers["Content-Range"].startswith(f"{after}-")


def test_breaks_that_make_progress_do_not_use_up_patience(faulty: Faulty, uploader: Uploader, moved: Bytes):
    faulty.faults = [Fault("PATCH", "", cut_upload(MIB + 7), times=5)]
    uploader._chunk_bytes = 2 * MIB
    many = DATA * 3
    assert uploader.bring(blob(many)) == "uploaded"
    assert faulty.blobs["a/b", sha256_digest(many)] == many
    assert moved.total == len(many)
    assert faulty.count("PATCH") > 5
    assert faulty.count("POST") == 1


def test_a_line_that_always_breaks_ends_in_an_error(faulty: Faulty, uploader: Uploader):
    faulty.faults = [Fault("PATCH", "", cut_upload(1000, keep=False), times=999)]
    with pytest.raises(AnswerError, match="broke"):
        uploader.bring(blob())
    assert faulty.blobs == {}
    assert faulty.count("PATCH") < 10


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_failing_patch_is_tried_again(faulty: Faulty, uploader: Uploader, moved: Bytes, status: int):
    faulty.faults = [Fault("PATCH", "", say(status, {"Retry-After": "0"}, b"<html>"), times=2)]
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)


def test_a_session_that_vanished_starts_again(faulty: Faulty, uploader: Uploader, moved: Bytes):
    def vanish(request: Handler) -> None:
        request.state.sessions.clear()
        say(404)(request)

    faulty.faults = [Fault("PATCH", "", vanish)]
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)
    assert moved.back == SIZE


def test_a_session_that_vanished_before_it_closed_starts_again(faulty: Faulty, uploader: Uploader, moved: Bytes):
    def vanish(request: Handler) -> None:
        request.state.sessions.clear()
        say(404)(request)

    faulty.faults = [Fault("PUT", "", vanish)]
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)


def test_a_closing_answer_that_is_lost_is_not_a_lost_blob(faulty: Faulty, uploader: Uploader, moved: Bytes):
    def close_silently(request: Handler) -> None:
        request.wfile = open("/dev/null", "wb")  # noqa: PTH123, SIM115 - the handler closes it
        request._route(request.path.partition("?")[0], {"digest": DIGEST})
        request.hang_up()

    faulty.faults = [Fault("PUT", "", close_silently)]
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)
    assert faulty.count("PATCH") == 1


def test_bytes_damaged_on_the_way_are_sent_once_more(faulty: Faulty, uploader: Uploader, moved: Bytes):
    def damage(request: Handler) -> None:
        session = request.state.sessions[request.path.partition("?")[0].rpartition("/")[2]]
        session[17] ^= 1
        request._route(request.path.partition("?")[0], {"digest": DIGEST})

    faulty.faults = [Fault("PUT", "", damage)]
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)
    faulty.blobs.clear()
    faulty.faults = [Fault("PUT", "", damage, times=9)]
    with pytest.raises(AnswerError, match="DIGEST_INVALID"):
        uploader.bring(blob())
    assert faulty.count("PATCH") == 2 + 2


def test_a_registry_that_lost_bytes_silently_is_caught(faulty: Faulty, uploader: Uploader, moved: Bytes):
    def drop(request: Handler) -> None:
        request.body()
        name = request.path.partition("?")[0].rpartition("/")[2]
        request.state.sessions[name] += DATA[:100]
        request.answer(202, {"Location": request.path, "Range": "0-99"})

    faulty.faults = [Fault("PATCH", "", drop)]
    assert uploader.bring(blob()) == "uploaded"
    assert_whole(faulty, moved)


def test_a_token_that_ends_in_mid_upload_is_renewed(
    faulty: Faulty,
    uploader: Uploader,
    moved: Bytes,
    store_login: Callable[[str], None],
):
    faulty.login = ("hilbert", "open sesame")
    store_login(faulty.host)

    def expire(request: Handler) -> None:
        request.state.tokens.clear()
        request._serve()

    for method in ("PATCH", "PUT"):
        faulty.blobs.clear()
        moved.total = 0
        faulty.faults = [Fault(method, "uploads", expire)]
        assert uploader.bring(blob()) == "uploaded"
        assert_whole(faulty, moved)


def test_a_short_lived_token_is_renewed_before_the_closing_put(
    faulty: Faulty, uploader: Uploader, store_login: Callable[[str], None]
):
    faulty.login = ("hilbert", "open sesame")
    faulty.token_lifetime_s = 30
    store_login(faulty.host)
    assert uploader.bring(blob()) == "uploaded"
    shown = {seen.method: seen.headers.get("Authorization") for seen in faulty.seen if "uploads" in seen.path}
    assert shown["PUT"] != shown["PATCH"]


def test_another_host_that_is_to_take_the_bytes_gets_no_login_and_names_no_realm(
    faulty: Faulty, uploader: Uploader, store_login: Callable[[str], None]
):
    faulty.login = ("hilbert", "open sesame")
    store_login(faulty.host)
    with faulty_registry() as other:
        session = f"http://{other.host}/v2/a/b/blobs/uploads/x"
        challenge = {"WWW-Authenticate": f'Bearer realm="http://{other.host}/token"'}
        faulty.faults = [Fault("POST", "uploads", say(202, {"Location": session}), times=9)]
        other.faults = [Fault("PATCH", "uploads", say(401, challenge), times=9)]
        with pytest.raises(AccessError):
            uploader.bring(blob())
        assert [(seen.method, seen.path) for seen in other.seen] == [("PATCH", "/v2/a/b/blobs/uploads/x")]
        assert "Authorization" not in other.seen[0].headers


def test_a_login_that_never_holds_for_a_whole_blob_is_an_access_error(
    faulty: Faulty, uploader: Uploader, store_login: Callable[[str], None]
):
    faulty.login = ("hilbert", "open sesame")
    store_login(faulty.host)

    def expire(request: Handler) -> None:
        request.state.tokens.clear()
        request._may(request.path)

    faulty.faults = [Fault("PATCH", "uploads", expire, times=99)]
    with pytest.raises(AccessError, match="expire"):
        uploader.bring(blob())


@pytest.mark.parametrize("mode", ["stream", "monolithic", "chunked"])
@pytest.mark.parametrize("change", [0, SIZE - 1])
def test_a_file_that_changed_never_arrives(faulty: Faulty, uploader: Uploader, mode: str, change: int):
    uploader.mode = mode  # type: ignore[assignment]
    changed = bytearray(DATA)
    changed[change] ^= 1
    with pytest.raises(RegistryError, match="the weights has changed"):
        uploader.bring(blob(bytes(changed), digest_of=DATA))
    assert faulty.blobs == {}
    assert mode == "monolithic" or faulty.count("PUT") == 0


@pytest.mark.parametrize("data", [DATA[:-1], DATA[: SIZE // 2], b""])
def test_a_file_that_shrank_never_arrives(faulty: Faulty, uploader: Uploader, data: bytes):
    with pytest.raises(RegistryError, match="the weights has changed"):
        uploader.bring(blob(data, digest_of=DATA))
    assert faulty.blobs == {}


def test_an_empty_blob_is_a_blob(faulty: Faulty, uploader: Uploader):
    empty = blob(b"", digest_of=b"")
    assert uploader.bring(empty) == "uploaded"
    assert faulty.blobs["a/b", sha256_digest(b"")] == b""
