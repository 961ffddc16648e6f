"""A whole push and a whole pull through a registry that misbehaves at each of their requests in turn."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_pack.console import Console
from gemma_pack.errors import GemmaPackError, RegistryError
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.describe import describe
from gemma_pack.oci.pull import pull
from gemma_pack.oci.push import push
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.retry import AnswerError
from gemma_pack.oci.transport import Timeouts
from gemma_pack.oci.upload import Uploader
from tests.oci.faulty import Fault, Faulty, Handler, cut_answer, cut_download, cut_upload, quick, say
from tests.oci.test_upload import DIGEST, MIB, SIZE, blob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

QUIET = Console("quiet")
NGINX = b"<html><head><title>502 Bad Gateway</title></head></html>"
REQUESTS = [
    ("GET", "/v2/$"),
    ("HEAD", "blobs/sha256"),
    ("POST", "blobs/uploads"),
    ("PATCH", "blobs/uploads"),
    ("PUT", "blobs/uploads"),
    ("PUT", "manifests/sha256"),
    ("PUT", "manifests/1"),
    ("GET", "manifests/"),
]
"""Every kind of request that a push cannot do without."""
ONCE = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture
def model(random_checkpoint: Callable[..., Path]) -> Path:
    return random_checkpoint(shards=1, size_bytes=50_000)


def forget(faulty: Faulty) -> None:
    """Empty the registry for the next example."""
    for state in (faulty.blobs, faulty.manifests, faulty.sessions, faulty.seen):
        state.clear()


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_whole(faulty: Faulty, model: Path, directory: Path) -> None:
    """Check that the tag names the image of `model`."""
    pull(f"{faulty.host}/a/b:1", directory, reporter=QUIET)
    assert files(directory) == files(model)


@pytest.mark.parametrize(("method", "path"), REQUESTS)
@pytest.mark.parametrize("status", [429, 500, 502])
def test_a_push_outlives_a_stumble_at_any_request(
    faulty: Faulty, model: Path, tmp_path: Path, method: str, path: str, status: int
):
    faulty.faults = [Fault(method, path, say(status, {"Retry-After": "0"}, NGINX), times=2)]
    push(model, f"{faulty.host}/a/b:1", retry=quick(), reporter=QUIET)
    assert faulty.faults[0].times == 0
    assert_whole(faulty, model, tmp_path / "pulled")


@pytest.mark.parametrize(("method", "path"), REQUESTS)
@pytest.mark.parametrize("after", [0, 17, 150])
def test_a_push_outlives_an_answer_that_is_cut_at_any_byte(
    faulty: Faulty, model: Path, tmp_path: Path, method: str, path: str, after: int
):
    """The registry did what it was asked, and its answer is lost: doing it again must do no harm."""
    faulty.faults = [Fault(method, path, cut_answer(after), times=2)]
    push(model, f"{faulty.host}/a/b:1", retry=quick(), reporter=QUIET)
    assert faulty.faults[0].times == 0
    assert_whole(faulty, model, tmp_path / "pulled")


@ONCE
@given(after=st.integers(0, 52_000), keep=st.booleans(), times=st.integers(1, 3))
def test_a_push_outlives_a_connection_cut_at_any_byte(
    faulty: Faulty, model: Path, tmp_path_factory: pytest.TempPathFactory, after: int, keep: bool, times: int
):
    forget(faulty)
    faulty.faults = [Fault("PATCH", "blobs/uploads", cut_upload(after, keep=keep), times=times)]
    push(model, f"{faulty.host}/a/b:1", retry=quick(8), reporter=QUIET)
    assert_whole(faulty, model, tmp_path_factory.mktemp("cut") / "pulled")


@ONCE
@given(after=st.integers(0, 52_000), times=st.integers(1, 3))
def test_a_pull_outlives_a_connection_cut_at_any_byte(
    faulty: Faulty, model: Path, tmp_path_factory: pytest.TempPathFactory, after: int, times: int
):
    push(model, f"{faulty.host}/a/b:1", reporter=QUIET)
    directory = tmp_path_factory.mktemp("cut") / "pulled"
    faulty.faults = [Fault("GET", "blobs/sha256", cut_download(after), times=times)]
    pull(f"{faulty.host}/a/b:1", directory, retry=quick(8), reporter=QUIET)
    assert files(directory) == files(model)


@pytest.mark.parametrize(("method", "path"), REQUESTS)
@pytest.mark.parametrize("status", [400, 404, 416, 500])
def test_a_registry_that_never_recovers_ends_in_one_of_our_errors_and_no_tag(
    faulty: Faulty, model: Path, tmp_path: Path, method: str, path: str, status: int
):
    faulty.faults = [Fault(method, path, say(status, {}, NGINX), times=999)]
    before = path not in {"manifests/", "manifests/1"} and method != "HEAD"  # the tag would be set
    failed = False
    try:
        push(model, f"{faulty.host}/a/b:1", retry=quick(2), reporter=QUIET)
    except GemmaPackError:
        failed = True
    assert not (failed and before and ("a/b", "1") in faulty.manifests)
    faulty.faults = []  # and the same command makes it whole
    push(model, f"{faulty.host}/a/b:1", retry=quick(), reporter=QUIET)
    assert_whole(faulty, model, tmp_path / "pulled")


def test_a_registry_whose_locations_are_relative_gets_a_whole_image(faulty: Faulty, model: Path, tmp_path: Path):
    faulty.relative = True
    push(model, f"{faulty.host}/a/b:1", reporter=QUIET)
    assert_whole(faulty, model, tmp_path / "pulled")


def test_a_mount_that_is_answered_with_a_session_costs_an_upload_and_no_more(
    faulty: Faulty, random_layout: Callable[..., Path], tmp_path: Path
):
    source = random_layout(shards=1, size_bytes=50_000)
    push(source, f"{faulty.host}/c/d:1", reporter=QUIET)

    def refuse(request: Handler) -> None:
        request._route(request.path.partition("?")[0], {})

    faulty.faults = [Fault("POST", "mount=", refuse, times=99)]
    result = push(source, f"{faulty.host}/a/b:1", mount_from=["c/d"], reporter=QUIET)
    assert (result.mounted_bytes, result.uploaded_bytes) == (0, result.size_bytes)
    assert_whole(faulty, tmp_path / "model", tmp_path / "pulled")
    assert faulty.sessions == {}


@pytest.mark.parametrize(("method", "path"), [("PUT", "blobs/uploads"), ("PUT", "manifests/"), ("GET", "manifests/1")])
def test_another_digest_than_the_one_sent_is_never_success(faulty: Faulty, model: Path, method: str, path: str):
    def lie(request: Handler) -> None:
        right = request.send_header
        request.send_header = lambda name, value: None if name == "Docker-Content-Digest" else right(name, value)  # type: ignore[method-assign]
        end = request.end_headers

        def with_lie() -> None:
            right("Docker-Content-Digest", f"sha256:{'0' * 64}")
            end()

        request.end_headers = with_lie  # type: ignore[method-assign]
        asked = urlsplit(request.path)
        try:
            request._route(asked.path, dict(parse_qsl(asked.query)))  # past the faults: the next answer lies, too
        finally:
            del request.send_header, request.end_headers

    push(model, f"{faulty.host}/a/b:2", reporter=QUIET)
    faulty.blobs.clear()
    faulty.faults = [Fault(method, path, lie, times=99)]
    with pytest.raises(RegistryError, match=f"(stored|sent) sha256:{'0' * 64}"):
        push(model, f"{faulty.host}/a/b:1", retry=quick(), reporter=QUIET)


def test_a_chunk_that_is_refused_with_416_goes_on_where_the_registry_is(faulty: Faulty):
    def lose_the_answer(request: Handler) -> None:
        name = request.path.partition("?")[0].rpartition("/")[2]
        request.state.sessions[name] += request.body()[: MIB // 2]  # half of it was written before a server died
        request.answer(416)

    with RegistryClient(parse_reference(f"{faulty.host}/a/b:1"), writable=True, retry=quick()) as client:
        uploader = Uploader(client, chunk_bytes=MIB)
        uploader.mode = "chunked"
        faulty.faults = [Fault("PATCH", "", lose_the_answer, after=1)]
        assert uploader.bring(blob()) == "uploaded"
        assert uploader.mode == "chunked"
    ranges = [seen.headers["Content-Range"].partition("-")[0] for seen in faulty.seen if seen.method == "PATCH"]
    assert ranges == ["0", str(MIB), str(MIB + MIB // 2), str(2 * MIB + MIB // 2)]
    assert len(faulty.blobs["a/b", DIGEST]) == SIZE


@pytest.fixture
def impatient(faulty: Faulty) -> Iterator[RegistryClient]:
    times = Timeouts(silence_s=1.0, document_s=0.3)
    with RegistryClient(parse_reference(f"{faulty.host}/a/b:1"), retry=quick(2), timeouts=times) as client:
        yield client


def test_a_document_that_trickles_in_is_given_up(faulty: Faulty, impatient: RegistryClient):
    def trickle(request: Handler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        for _ in range(1000):
            request.wfile.write(b" ")
            request.wfile.flush()
            time.sleep(0.02)

    faulty.faults = [Fault("GET", "manifests/1", trickle, times=99)]
    begin_s = time.monotonic()
    with pytest.raises(AnswerError, match="bytes in 0 s"):
        impatient.manifest("1")
    assert time.monotonic() - begin_s < 5


def test_a_tag_that_moves_between_inspect_and_pull_does_not_change_what_was_inspected(
    faulty: Faulty, model: Path, random_checkpoint: Callable[..., Path], tmp_path: Path
):
    reference = f"{faulty.host}/a/b:1"
    push(model, reference, reporter=QUIET)
    inspected = describe(reference).digest
    other = random_checkpoint("other", shards=1, size_bytes=1000)
    moved = push(other, reference, reporter=QUIET).digest
    pinned = str(replace(parse_reference(reference), digest=inspected))
    assert pull(pinned, tmp_path / "pinned", reporter=QUIET).digest == inspected
    assert files(tmp_path / "pinned") == files(model)
    assert pull(reference, tmp_path / "moved", reporter=QUIET).digest == moved
    assert files(tmp_path / "moved") == files(other)
