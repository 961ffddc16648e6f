"""Documents of an image: what is written is read back, and nothing malformed gets in."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.errors import RegistryError
from gemma_pack.oci.manifest import (
    DOCKER_MANIFEST_TYPE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    Index,
    Manifest,
    Platform,
    describe,
    encode_json,
    parse_json,
    sha256_digest,
)

DIGEST = "sha256:" + "a" * 64
texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789_.-", min_size=1, max_size=8)
platforms = st.builds(Platform, names, names, st.none() | names)
descriptors = st.builds(
    Descriptor,
    media_type=texts,
    digest=st.text("0123456789abcdef", min_size=64, max_size=64).map("sha256:".__add__),
    size_bytes=st.integers(0, 1 << 62),
    annotations=st.dictionaries(texts, texts, max_size=3),
    platform=st.none() | platforms,
    artifact_type=st.none() | texts,
)
manifests = st.builds(
    Manifest,
    config=descriptors,
    layers=st.lists(descriptors, max_size=3).map(tuple),
    annotations=st.dictionaries(texts, texts, max_size=3),
    artifact_type=st.none() | texts,
    subject=st.none() | descriptors,
)
indexes = st.builds(
    Index,
    manifests=st.lists(descriptors, max_size=3).map(tuple),
    annotations=st.dictionaries(texts, texts, max_size=3),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
SOUND = {"mediaType": MANIFEST_TYPE, "digest": DIGEST, "size": 3}


@given(manifest=manifests)
def test_a_manifest_is_read_back_as_it_was_written(manifest: Manifest) -> None:
    assert Manifest.parse(manifest.encode(), origin="it") == manifest


@given(index=indexes)
def test_an_index_is_read_back_as_it_was_written(index: Index) -> None:
    assert Index.parse(index.encode(), origin="it") == index


def test_the_order_in_which_annotations_were_added_does_not_show() -> None:
    config = describe(b"{}", "x")
    one = Manifest(config=config, layers=(), annotations={"a": "1", "b": "2"})
    other = Manifest(config=config, layers=(), annotations={"b": "2", "a": "1"})
    assert one.encode() == other.encode()


@given(document=json_values, kind=st.sampled_from([Manifest, Index]))
def test_arbitrary_json_is_parsed_or_refused(document: Any, kind: type[Manifest | Index]) -> None:
    with suppress(RegistryError):
        kind.parse(json.dumps(document).encode(), origin="it")


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RegistryError, match="it"):
        Manifest.parse(data, origin="it")


@given(
    key=st.sampled_from(["mediaType", "digest", "size", "annotations", "platform", "artifactType"]), value=json_values
)
def test_one_wrong_field_of_a_descriptor_never_gets_in(key: str, value: Any) -> None:
    try:
        descriptor = Descriptor.from_json({**SOUND, key: value}, origin="it")
    except RegistryError:
        return
    assert descriptor.size_bytes >= 0
    assert len(descriptor.hex) == 64
    assert descriptor.to_json()["digest"] == f"sha256:{descriptor.hex}"
    encode_json(descriptor.to_json())


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "sha256:" + "A" * 64},
        {"digest": "sha256:../../../etc/passwd"},
        {"digest": DIGEST + "\n"},
        {"digest": "sha512:" + "a" * 128},
        {"digest": None},
        {"size": -1},
        {"size": True},
        {"size": "3"},
        {"size": 3.0},
        {"mediaType": ""},
        {"annotations": {"a": 1}},
        {"annotations": []},
        {"platform": {"os": "linux"}},
    ],
)
def test_a_malformed_descriptor_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RegistryError):
        Descriptor.from_json({**SOUND, **change}, origin="it")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 200_000, "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": "' + b"x" * (4 << 20) + b'"}', "4 MiB"),
    ],
)
def test_documents_that_would_harm_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        parse_json(data, origin="it")


def test_an_index_is_not_taken_for_a_manifest_nor_the_reverse() -> None:
    index, manifest = Index(manifests=()), Manifest(config=describe(b"{}", "x"), layers=())
    with pytest.raises(RegistryError, match="not an image manifest"):
        Manifest.parse(index.encode(), origin="it")
    with pytest.raises(RegistryError, match="not an image index"):
        Index.parse(manifest.encode(), origin="it")


def test_dockers_own_manifests_are_read_too() -> None:
    manifest = Manifest(config=describe(b"{}", "x"), layers=(), media_type=DOCKER_MANIFEST_TYPE)
    assert Manifest.parse(manifest.encode(), origin="it") == manifest


@given(platform=platforms)
def test_a_platform_reads_what_it_writes(platform: Platform) -> None:
    assert Platform.parse(str(platform)) == platform


@pytest.mark.parametrize("text", ["linux", "", "linux/", "Linux/amd64", "linux/amd64/v8/x", "linux amd64"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as linux/amd64"):
        Platform.parse(text)


def test_the_digest_of_the_empty_json_object_is_the_one_in_the_specification() -> None:
    # OCI image-spec manifest.md, "Guidance for an empty descriptor".
    expected = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert sha256_digest(encode_json({})) == expected
    assert describe(b"{}", INDEX_TYPE).size_bytes == 2
