from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gemma_pack.errors import OfflineError, RegistryError
from gemma_pack.oci import client as client_module
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.manifest import INDEX_TYPE, MANIFEST_TYPE, sha256_digest
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.retry import AnswerError
from tests.oci.faulty import Fault, Faulty, cut_download, quick, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.oci.registry import Registry

DATA = b"weights" * 1000
DIGEST = sha256_digest(DATA)
OTHER = "sha256:" + "0" * 64
INDEX = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}'


@pytest.fixture
def client(faulty: Faulty) -> Iterator[RegistryClient]:
    with RegistryClient(parse_reference(f"{faulty.host}/a/b:1"), writable=True, retry=quick()) as client:
        yield client


@pytest.fixture
def real(registry: Registry) -> Iterator[RegistryClient]:
    with RegistryClient(parse_reference(f"{registry.host}/a/b:1"), writable=True, retry=quick()) as client:
        yield client


def upload(client: RegistryClient, data: bytes = DATA) -> None:
    session = client.patch(client.start_upload(), iter([data]), start=0, size_bytes=len(data), ranged=False)
    client.finish(session, sha256_digest(data))


def test_ping_tells_a_registry_from_what_is_none(client: RegistryClient, faulty: Faulty):
    client.ping()
    faulty.faults = [Fault("GET", "/v2/", say(404))]
    with pytest.raises(RegistryError, match="does not speak the registry protocol"):
        client.ping()


def test_ping_of_nobody_is_offline(free_port: int):
    with (
        RegistryClient(parse_reference(f"127.0.0.1:{free_port}/a"), retry=quick()) as client,
        pytest.raises(OfflineError),
    ):
        client.ping()


def test_a_blob_goes_through_a_real_registry_and_back(real: RegistryClient):
    assert real.blob_size(DIGEST) is None
    upload(real)
    assert real.blob_size(DIGEST) == len(DATA)
    with real.open_blob(DIGEST) as stream:
        assert (stream.offset, b"".join(stream.pieces)) == (0, DATA)
    with real.open_blob(DIGEST, 1234) as stream:
        assert (stream.offset, b"".join(stream.pieces)) == (1234, DATA[1234:])


def test_chunks_and_their_status_in_a_real_registry(real: RegistryClient):
    session = real.patch(real.start_upload(), iter([DATA[:3000]]), start=0, size_bytes=3000, ranged=True)
    assert session.offset == 3000
    status = real.upload_status(session)
    assert status
    assert status.offset == 3000
    rest = DATA[3000:]
    session = real.patch(status, iter([rest]), start=3000, size_bytes=len(rest), ranged=True)
    real.finish(session, DIGEST)
    assert real.blob_size(DIGEST) == len(DATA)
    assert real.upload_status(session) is None


def test_one_put_carries_a_whole_blob_to_a_real_registry(real: RegistryClient):
    real.put_blob(real.start_upload(), DIGEST, iter([DATA]), len(DATA))
    assert real.blob_size(DIGEST) == len(DATA)


def test_a_mount_in_a_real_registry(real: RegistryClient, registry: Registry):
    upload(real)
    with RegistryClient(parse_reference(f"{registry.host}/c/d:1"), writable=True, retry=quick()) as other:
        assert other.mount(DIGEST, "a/b") is None
        assert other.blob_size(DIGEST) == len(DATA)
        session = other.mount(OTHER, "a/b")
        assert session is not None
        other.cancel(session)


def test_manifests_in_a_real_registry(real: RegistryClient):
    digest = real.put_manifest("1", INDEX, INDEX_TYPE)
    document = real.manifest("1")
    assert document.data == INDEX
    assert document.descriptor.digest == digest == sha256_digest(INDEX)
    assert document.descriptor.media_type == INDEX_TYPE
    assert real.manifest(digest).data == INDEX


def test_a_missing_image_is_named(client: RegistryClient):
    with pytest.raises(RegistryError, match="has no image a/b under nightly"):
        client.manifest("nightly")


def test_a_manifest_whose_bytes_are_not_its_digests_is_refused(client: RegistryClient, faulty: Faulty):
    faulty.manifests["a/b", OTHER] = (MANIFEST_TYPE, b"{}")
    with pytest.raises(RegistryError, match="sent other bytes"):
        client.manifest(OTHER)


@pytest.mark.parametrize("relative", [True, False])
def test_locations_may_be_relative_and_keep_their_query(client: RegistryClient, faulty: Faulty, relative: bool):
    faulty.relative = relative
    session = client.start_upload()
    assert str(session.url) == f"http://{faulty.host}/v2/a/b/blobs/uploads/session-0?_state=a%3Db"
    client.put_blob(session, DIGEST, iter([DATA]), len(DATA))
    assert faulty.seen[-1].query == f"_state=a%3Db&digest=sha256%3A{DIGEST[7:]}"


def test_a_session_without_a_location_is_an_error(client: RegistryClient, faulty: Faulty):
    faulty.faults = [Fault("POST", "", say(202))]
    with pytest.raises(RegistryError, match="Location"):
        client.start_upload()


def test_the_smallest_chunk_is_heard(client: RegistryClient, faulty: Faulty):
    faulty.faults = [Fault("POST", "", say(202, {"Location": "/x", "OCI-Chunk-Min-Length": "5242880"}))]
    assert client.start_upload().min_chunk_bytes == 5242880


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-1", "x"])
def test_numbers_that_are_none_are_passed_over(client: RegistryClient, faulty: Faulty, number: str):
    headers = {"Location": "/x", "OCI-Chunk-Min-Length": number, "Range": f"0-{number}"}
    faulty.faults = [Fault("POST", "", say(202, headers))]
    session = client.start_upload()
    assert (session.min_chunk_bytes, session.offset) == (0, None)


def test_another_digest_echoed_is_an_error(client: RegistryClient, faulty: Faulty):
    faulty.faults = [
        Fault("PUT", "uploads", say(201, {"Docker-Content-Digest": OTHER})),
        Fault("PUT", "manifests", say(201, {"Docker-Content-Digest": OTHER})),
    ]
    with pytest.raises(RegistryError, match=f"stored {OTHER}"):
        upload(client)
    with pytest.raises(RegistryError, match=f"stored {OTHER}"):
        client.put_manifest("1", INDEX, INDEX_TYPE)


def test_a_registry_that_ignores_range_says_so_by_its_status(client: RegistryClient, faulty: Faulty):
    faulty.faults = [Fault("GET", "blobs", say(200, body=DATA))]
    with client.open_blob(DIGEST, 100) as stream:
        assert stream.offset == 0


def test_another_range_than_asked_for_is_refused(client: RegistryClient, faulty: Faulty):
    faulty.faults = [Fault("GET", "blobs", say(206, {"Content-Range": "bytes 0-6999/7000"}, DATA))]
    with pytest.raises(RegistryError, match="another range"), client.open_blob(DIGEST, 100):
        pass


def test_a_body_that_breaks_off_is_an_answer_error(client: RegistryClient, faulty: Faulty):
    faulty.blobs["a/b", DIGEST] = DATA
    faulty.faults = [Fault("GET", "blobs", cut_download(1000))]
    received = b""
    with pytest.raises(AnswerError) as caught, client.open_blob(DIGEST) as stream:  # noqa: PT012 - what came before
        for piece in stream.pieces:
            received += piece
    assert caught.value.transient
    assert received == DATA[:1000]


def test_a_trickle_counts_as_broken(client: RegistryClient, faulty: Faulty, monkeypatch: pytest.MonkeyPatch):
    faulty.blobs["a/b", DIGEST] = DATA
    monkeypatch.setattr(client_module, "STALL_WINDOW_S", -1.0)
    with pytest.raises(AnswerError, match="bytes in 0 s") as caught, client.open_blob(DIGEST) as stream:
        list(stream.pieces)
    assert caught.value.transient


def test_a_closing_put_whose_answer_is_lost_is_asked_again(client: RegistryClient, faulty: Faulty):
    session = client.patch(client.start_upload(), iter([DATA]), start=0, size_bytes=len(DATA), ranged=False)
    faulty.faults = [Fault("PUT", "", lambda request: request.hang_up())]
    client.finish(session, DIGEST)
    assert faulty.blobs["a/b", DIGEST] == DATA
