"""Referrers: documents that lie beside an image in its repository and name it as their subject.

A referrer is a manifest of one blob whose `subject` is the image. A registry that knows OCI 1.1 lists them by itself;
for any other, the client keeps the list, as an index under the tag `sha256-<hex of the image>`. Nothing locks that
tag, so two clients may replace each other's list; see `_keep_list` for what is done about it.

Sources: distribution-spec, "Pushing Manifests with Subject", "Listing Referrers", "Referrers Tag Schema";
image-spec manifest.md, "Guidelines for Artifact Usage".
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from gemma_pack.errors import RegistryError
from gemma_pack.oci.body import Blob
from gemma_pack.oci.manifest import (
    EMPTY_TYPE,
    INDEX_TYPE,
    INDEX_TYPES,
    MANIFEST_TYPE,
    MAX_DOCUMENT_BYTES,
    Descriptor,
    Document,
    Index,
    Manifest,
    describe,
    sha256_digest,
)
from gemma_pack.oci.upload import Uploader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gemma_pack.oci.client import RegistryClient

SETTLE_S: Final = 0.5
"""A list that was replaced is read again after this long, or up to twice as long."""
MAX_ROUNDS: Final = 12
"""Of replacing and reading again, before the registry is taken for one that cannot keep the list."""
_EMPTY: Final = b"{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """One document to attach."""

    artifact_type: str
    data: bytes = field(repr=False)
    title: str
    """The file name under which clients that go by titles save it."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Copied into the list, so that a reader can choose without fetching."""


def attach(client: RegistryClient, subject: Descriptor, attachments: Sequence[Attachment]) -> list[Descriptor]:
    """Attach documents to the image `subject`, and return the descriptors of their manifests.

    What is attached already stays as it is. All of them are in the list when this returns.

    Raises:
        RegistryError: the registry refuses them, or loses its list of them.
        AccessError: the login may not write.
    """
    manifests = [_manifest(subject, attachment) for attachment in attachments]
    descriptors = [manifest.descriptor for manifest in manifests]
    listed = {descriptor.digest for descriptor in list_referrers(client, subject.digest)}
    missing = [number for number, descriptor in enumerate(descriptors) if descriptor.digest not in listed]
    if not missing:
        return descriptors
    uploader = Uploader(client)
    for data in (_EMPTY, *(attachments[number].data for number in missing)):
        uploader.bring(_blob(data))
    known = [client.put_referrer(manifests[number].data) for number in missing]
    if not all(known):
        _keep_list(client, subject.digest, [descriptors[number] for number in missing])
    return descriptors


def list_referrers(client: RegistryClient, digest: str) -> list[Descriptor]:
    """Return what refers to the image `digest`: the registry's own list or the one that clients keep.

    Raises:
        RegistryError: the list is broken, or its tag names something else.
    """
    found = client.referrers(digest)
    return _kept_list(client, digest) if found is None else found


def read_referrer(client: RegistryClient, referrer: Descriptor, subject: str) -> Document:
    """Return the document of a referrer of the image `subject`, checked against the digests of manifest and blob.

    Raises:
        RegistryError: it is gone, damaged, larger than 4 MiB, not of one blob, or about another image.
    """
    manifest = Manifest.parse(client.manifest(referrer.digest).data, origin=referrer.digest)
    if manifest.subject is None or manifest.subject.digest != subject:
        raise RegistryError(f"{referrer.digest} does not refer to {subject}")
    if len(manifest.layers) != 1:
        raise RegistryError(f"{referrer.digest} holds {len(manifest.layers)} documents where one is wanted")
    blob = manifest.layers[0]
    if blob.size_bytes > MAX_DOCUMENT_BYTES:
        raise RegistryError(f"the document of {referrer.digest} has {blob.size_bytes} bytes, 4 MiB at most")
    data = client.patience.run(lambda: _read(client, blob))
    if sha256_digest(data) != blob.digest:
        raise RegistryError(f"the document of {referrer.digest} is damaged: its bytes have another digest")
    return Document(descriptor=blob, data=data)


def _manifest(subject: Descriptor, attachment: Attachment) -> Document:
    """Return the manifest that holds an attachment, described as a list of referrers describes it."""
    title = {"org.opencontainers.image.title": attachment.title}
    data = Manifest(
        config=describe(_EMPTY, EMPTY_TYPE),
        layers=(describe(attachment.data, attachment.artifact_type, annotations=title),),
        annotations=attachment.annotations,
        artifact_type=attachment.artifact_type,
        subject=replace(subject, annotations={}, platform=None, artifact_type=None),
    ).encode()
    described = describe(
        data, MANIFEST_TYPE, artifact_type=attachment.artifact_type, annotations=attachment.annotations
    )
    return Document(descriptor=described, data=data)


def _blob(data: bytes) -> Blob:
    digest = sha256_digest(data)
    return Blob(size_bytes=len(data), digest=digest, read=lambda: iter([data]), label="a document", key=digest)


def _keep_list(client: RegistryClient, digest: str, ours: Sequence[Descriptor]) -> None:
    """Add `ours` to the list that clients keep, until they are in it.

    Whoever replaces our list by one without ours has read it before we wrote, and writes right after reading. So it
    is read again a little later, longer than a client takes from reading to writing; where ours are gone, they are
    added to what is there then.
    """
    for _ in range(MAX_ROUNDS):
        present = _kept_list(client, digest)
        missing = [one for one in ours if one.digest not in {other.digest for other in present}]
        if missing:
            index = Index(manifests=(*present, *missing)).encode()
            client.put_manifest(_list_tag(digest), index, INDEX_TYPE)
        client.patience.stop.wait(random.uniform(SETTLE_S, 2 * SETTLE_S))  # noqa: S311 - spreads clients, guards nothing
        if {one.digest for one in ours} <= {one.digest for one in _kept_list(client, digest)}:
            return
    raise RegistryError(
        f"{client.transport.host} does not keep what is attached to {digest} in the list {_list_tag(digest)}",
        hint="others replace the list all the time: run the command again when they are done",
    )


def _kept_list(client: RegistryClient, digest: str) -> list[Descriptor]:
    found = client.find_manifest(_list_tag(digest))
    if found is None:
        return []
    if found.descriptor.media_type not in INDEX_TYPES:
        raise RegistryError(
            f"the tag {_list_tag(digest)} of {client.reference.repository} is no list of referrers but "
            f"{found.descriptor.media_type}",
            hint="remove the tag; OCI reserves it for that list",
        )
    return list(Index.parse(found.data, origin=_list_tag(digest)).manifests)


def _list_tag(digest: str) -> str:
    return digest.replace(":", "-")


def _read(client: RegistryClient, blob: Descriptor) -> bytes:
    data = bytearray()
    with client.open_blob(blob.digest) as stream:
        for piece in stream.pieces:
            data += piece
            if len(data) > blob.size_bytes:
                raise RegistryError(f"{blob.digest} is longer than its descriptor says")
    return bytes(data)
