"""Referrers in a registry that lists them, in a real one that does not, and under everything that lists suffer."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.errors import RegistryError
from gemma_pack.oci import client as client_module
from gemma_pack.oci import referrers
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.manifest import INDEX_TYPE, MANIFEST_TYPE, Descriptor, Index, describe
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.referrers import Attachment, attach, list_referrers, read_referrer
from tests.oci.faulty import Fault, Faulty, Pauses, quick, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.oci.registry import Registry

IMAGE = Index(manifests=(), annotations={"a": "model"}).encode()
SUBJECT = describe(IMAGE, INDEX_TYPE)
TAG = SUBJECT.digest.replace(":", "-")


def note(text: str) -> Attachment:
    return Attachment(
        artifact_type="application/vnd.test.note+json",
        data=json.dumps({"note": text}).encode(),
        title="note.json",
        annotations={"of": text},
    )


@pytest.fixture(params=["docker-registry 2.8", "OCI 1.1"])
def client(request: pytest.FixtureRequest) -> Iterator[RegistryClient]:
    """Yield a client of a registry that holds IMAGE: a real one without a list of referrers, or one with."""
    with_list = request.param == "OCI 1.1"
    found: Any = request.getfixturevalue("faulty" if with_list else "registry")
    if with_list:
        found.referrers = True
    with connected(found.host) as client:
        yield client


def connected(host: str) -> RegistryClient:
    client = RegistryClient(parse_reference(f"{host}/team/gemma:1"), writable=True, retry=quick())
    client.put_manifest("1", IMAGE, INDEX_TYPE)
    client.patience.stop = Pauses()
    return client


def test_what_is_attached_is_listed_and_read_back(client: RegistryClient):
    notes = [note(text) for text in ("a", "b", "c")]
    attached = attach(client, SUBJECT, notes)
    listed = list_referrers(client, SUBJECT.digest)
    assert sorted(listed, key=lambda one: one.digest) == sorted(attached, key=lambda one: one.digest)
    assert {(one.media_type, one.artifact_type) for one in listed} == {(MANIFEST_TYPE, notes[0].artifact_type)}
    for one, descriptor in zip(notes, attached, strict=True):
        assert descriptor.annotations == {"of": json.loads(one.data)["note"]}
        document = read_referrer(client, descriptor, SUBJECT.digest)
        assert (document.data, document.descriptor.title) == (one.data, "note.json")


def test_the_list_of_an_image_that_has_none_is_empty(client: RegistryClient):
    assert list_referrers(client, SUBJECT.digest) == []


def test_attaching_again_changes_nothing(client: RegistryClient):
    first = attach(client, SUBJECT, [note("a")])
    before = list_referrers(client, SUBJECT.digest)
    assert attach(client, SUBJECT, [note("a"), note("b")])[0] == first[0]
    assert [one for one in list_referrers(client, SUBJECT.digest) if one in before] == before
    assert len(list_referrers(client, SUBJECT.digest)) == 2


def test_the_manifest_is_what_the_specification_wants(client: RegistryClient, valid_oci: Callable[[str, Any], None]):
    (attached,) = attach(client, replace(SUBJECT, annotations={"not": "copied"}), [note("a")])
    manifest = json.loads(client.manifest(attached.digest).data)
    valid_oci("image-manifest", manifest)
    assert manifest["subject"] == {"mediaType": INDEX_TYPE, "digest": SUBJECT.digest, "size": len(IMAGE)}
    assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert client.blob_size(manifest["config"]["digest"]) == 2  # some clients want the blob, too


def test_the_tag_of_the_list_is_used_only_where_the_registry_keeps_none(client: RegistryClient, request: Any):
    attach(client, SUBJECT, [note("a")])
    found = client.find_manifest(TAG)
    assert (found is None) == ("OCI 1.1" in request.node.name)
    assert client.tags() == ("1",)  # it is no image


@pytest.mark.parametrize("status", [400, 405, 406])
def test_a_registry_that_refuses_to_list_gets_the_kept_list(faulty: Faulty, status: int):
    faulty.faults = [Fault("GET", "/referrers/", say(status), times=99)]
    with connected(faulty.host) as client:
        attached = attach(client, SUBJECT, [note("a")])
        assert list_referrers(client, SUBJECT.digest) == attached
        assert client.find_manifest(TAG)


def test_the_kept_list_is_an_index_as_published(registry: Registry, valid_oci: Callable[[str, Any], None]):
    with connected(registry.host) as client:
        attach(client, SUBJECT, [note("a")])
        index = json.loads(client.manifest(TAG).data)
    valid_oci("image-index", index)
    assert index["manifests"][0]["artifactType"] == "application/vnd.test.note+json"
    assert index["manifests"][0]["annotations"] == {"of": "a"}


def test_clients_that_attach_at_once_lose_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(referrers, "SETTLE_S", 0.1)
    start = threading.Barrier(6)

    def one(number: int) -> list[Descriptor]:
        with RegistryClient(parse_reference(f"{registry.host}/team/gemma:1"), writable=True, retry=quick()) as client:
            client.put_manifest("1", IMAGE, INDEX_TYPE)
            start.wait(10)
            return attach(client, SUBJECT, [note(f"{number} {letter}") for letter in "ab"])

    with ThreadPoolExecutor(6) as pool:
        attached = [descriptor.digest for descriptors in pool.map(one, range(6)) for descriptor in descriptors]
    with connected(registry.host) as client:
        assert {one.digest for one in list_referrers(client, SUBJECT.digest)} == set(attached)
    assert len(set(attached)) == 12


def test_a_list_that_another_client_replaced_is_mended(faulty: Faulty, monkeypatch: pytest.MonkeyPatch):
    theirs = Index(manifests=(describe(b"{}", MANIFEST_TYPE, artifact_type="theirs"),)).encode()
    with connected(faulty.host) as client:
        replaced = []

        def replace_once(seconds: float | None = None) -> bool:
            if not replaced:
                faulty.manifests["team/gemma", TAG] = (INDEX_TYPE, theirs)
                replaced.append(seconds)
            return False

        monkeypatch.setattr(client.patience.stop, "wait", replace_once)
        attach(client, SUBJECT, [note("a")])
        assert {one.artifact_type for one in list_referrers(client, SUBJECT.digest)} == {
            "theirs",
            note("a").artifact_type,
        }
    assert replaced[0] >= referrers.SETTLE_S


def test_a_registry_that_always_loses_the_list_is_named(faulty: Faulty):
    faulty.faults = [Fault("PUT", f"/manifests/{TAG}", say(201), times=100)]
    with connected(faulty.host) as client, pytest.raises(RegistryError, match="does not keep what is attached"):
        attach(client, SUBJECT, [note("a")])
    assert faulty.count("PUT", TAG) == referrers.MAX_ROUNDS


def test_a_tag_that_is_no_list_is_not_replaced(faulty: Faulty):
    with connected(faulty.host) as client:
        image = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}'
        client.put_manifest(TAG, image, MANIFEST_TYPE)
        with pytest.raises(RegistryError, match="is no list of referrers"):
            attach(client, SUBJECT, [note("a")])
        assert client.manifest(TAG).data == image


def test_a_page_of_html_is_no_list(faulty: Faulty):
    faulty.faults = [Fault("GET", "/referrers/", say(200, {"Content-Type": "text/html"}, b"<html>"), times=9)]
    with connected(faulty.host) as client:
        attach(client, SUBJECT, [note("a")])
        assert len(list_referrers(client, SUBJECT.digest)) == 1


def test_a_list_without_end_is_refused(faulty: Faulty):
    faulty.referrers = True
    endless = {"Content-Type": INDEX_TYPE, "Link": f'</v2/team/gemma/referrers/{SUBJECT.digest}>; rel="next"'}
    faulty.faults = [Fault("GET", "/referrers/", say(200, endless, Index(manifests=()).encode()), times=100)]
    with connected(faulty.host) as client, pytest.raises(RegistryError, match="without end"):
        list_referrers(client, SUBJECT.digest)
    assert faulty.count("GET", "/referrers/") == client_module.MAX_REFERRER_PAGES


@pytest.mark.parametrize("wrong", ["subject", "blobs", "bytes", "size"])
def test_a_referrer_is_not_believed(faulty: Faulty, wrong: str):
    with connected(faulty.host) as client:
        (attached,) = attach(client, SUBJECT, [note("a")])
        manifest = json.loads(client.manifest(attached.digest).data)
        blob = manifest["layers"][0]
        if wrong == "subject":
            manifest["subject"]["digest"] = "sha256:" + "0" * 64
        if wrong == "blobs":
            manifest["layers"].append(blob)
        if wrong == "bytes":
            faulty.blobs["team/gemma", blob["digest"]] = b'{"note": "x"}'
        if wrong == "size":
            blob["size"] = 5 << 20
        changed = describe(json.dumps(manifest).encode(), MANIFEST_TYPE)
        client.put_manifest(changed.digest, json.dumps(manifest).encode(), MANIFEST_TYPE)
        with pytest.raises(RegistryError, match=r"does not refer|documents where one|another digest|at most"):
            read_referrer(client, changed, SUBJECT.digest)


def test_a_blob_that_never_ends_is_cut_off(faulty: Faulty):
    with connected(faulty.host) as client:
        (attached,) = attach(client, SUBJECT, [note("a")])
        faulty.faults = [Fault("GET", "/blobs/", say(200, {}, b"x" * 100_000))]
        with pytest.raises(RegistryError, match="longer than its descriptor says"):
            read_referrer(client, attached, SUBJECT.digest)
