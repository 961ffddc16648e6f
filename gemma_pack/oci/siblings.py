"""The images that a repository has already: which of a new image's layers they hold, and under which tag.

A variant shares the tokenizer and the shards of untouched tensors with the other variants of its model. Their
manifests, a few kilobytes each, say which blobs there are. A layer that nobody has read yet has no digest to ask for:
one that may be there, because a sibling has one of its size and a few samples of the bytes agree, is worth reading
before it is sent; any other is read and sent at once.

What cannot be read here costs the push nothing but that.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from gemma_pack.errors import GemmaPackError
from gemma_pack.oci.manifest import INDEX_TYPES, Index, Manifest
from gemma_pack.oci.transfer import in_parallel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from gemma_pack.oci.client import RegistryClient
    from gemma_pack.oci.layers import Layer

MAX_SIBLINGS: Final = 16
MAX_PLATFORMS: Final = 8
READERS: Final = 8
SAMPLES: Final = 4
SAMPLE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Sibling:
    """An image in the registry: the sizes in bytes of its blobs, by digest."""

    name: str
    """Its tag, with its repository where that is another one."""
    client: RegistryClient
    blobs: Mapping[str, int]


class Siblings:
    """The images beside the one that is pushed."""

    def __init__(self, siblings: Sequence[Sibling]) -> None:
        """Keep them in the order in which they are named."""
        self._siblings = siblings

    @classmethod
    def find(cls, clients: Sequence[RegistryClient], tag: str) -> Self:
        """Return the images of the repositories of `clients`, the first being that of the push, and `tag` its tag."""
        with_tags = [(client, _tags(client)) for client in clients]
        # the tag that is replaced first: what is pushed again is mostly there; then the newest by name
        named = [
            (client, name)
            for client, tags in with_tags
            for name in sorted(tags, key=lambda name: (client is clients[0] and name == tag, name), reverse=True)
        ]
        jobs = [
            partial(_read, client, name, name if client is clients[0] else f"{client.reference.repository}:{name}")
            for client, name in named[:MAX_SIBLINGS]
        ]
        found = in_parallel(jobs, threading.Event(), READERS)
        return cls([sibling for sibling in found if sibling])

    def may_hold(self, layer: Layer) -> bool:
        """Tell whether one of them has a blob of the layer's size, whose bytes agree wherever they are sampled."""
        places = {
            digest: sibling.client
            for sibling in self._siblings
            for digest, size_bytes in sibling.blobs.items()
            if size_bytes == layer.size_bytes
        }
        return any(_agree(client, digest, layer) for digest, client in places.items())

    def most_shared(self, digests: Iterable[str]) -> tuple[str, int]:
        """Return the sibling that has the most bytes of the blobs `digests`, and how many; "" and 0 for none."""
        wanted = set(digests)
        shared = [
            (sibling.name, sum(size for digest, size in sibling.blobs.items() if digest in wanted))
            for sibling in self._siblings
        ]
        name, size_bytes = max(shared, key=lambda one: one[1], default=("", 0))
        return (name, size_bytes) if size_bytes else ("", 0)


def _tags(client: RegistryClient) -> tuple[str, ...]:
    try:
        return client.tags()
    except GemmaPackError:
        return ()


def _read(client: RegistryClient, tag: str, name: str) -> Sibling | None:
    try:
        root = client.manifest(tag)
        documents = [root]
        if root.descriptor.media_type in INDEX_TYPES:
            index = Index.parse(root.data, origin=name)
            documents = [client.manifest(one.digest) for one in index.manifests[:MAX_PLATFORMS]]
        manifests = [Manifest.parse(document.data, origin=name) for document in documents]
    except GemmaPackError:
        return None
    blobs = {blob.digest: blob.size_bytes for one in manifests for blob in (one.config, *one.layers)}
    return Sibling(name=name, client=client, blobs=blobs)


def _agree(client: RegistryClient, digest: str, layer: Layer) -> bool:
    """Compare a few samples, spread over the whole, of a blob in the registry with those of a layer on disk."""
    step = max(1, layer.size_bytes // SAMPLES)
    for start in range(step // 2, layer.size_bytes, step):
        end = min(start + SAMPLE_BYTES, layer.size_bytes)
        try:
            with client.open_blob(digest, start, end) as stream:
                if stream.offset != start:  # a registry without ranges: reading the file is cheaper than the blob
                    return True
                theirs = _first(stream.pieces, end - start)
        except GemmaPackError:
            return False
        if theirs != _first(layer.iter_chunks(start), end - start):
            return False
    return True


def _first(pieces: Iterator[bytes], size_bytes: int) -> bytes:
    """Return the first bytes of a stream, all of them in pieces of any size."""
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) >= size_bytes:
            break
    return bytes(data[:size_bytes])
