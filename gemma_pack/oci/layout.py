"""An OCI image layout: an image as a directory of blobs, named by their digests.

    oci-layout            {"imageLayoutVersion": "1.0.0"}
    index.json            what the layout holds: one descriptor an image
    blobs/sha256/<hex>    indexes, manifests, configs, layers

`Layout` reads one and trusts nothing in it: documents are checked against their digest, blobs against their size.
`LayoutWriter` hashes each blob while it is written, once, and the layout appears whole or not at all.

Source: https://github.com/opencontainers/image-spec/blob/main/image-layout.md
"""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from gemma_pack.disk import staged_directory
from gemma_pack.errors import RegistryError
from gemma_pack.oci.manifest import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT_BYTES,
    Descriptor,
    Index,
    Manifest,
    encode_json,
    parse_json,
    sha256_digest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_MARKER: Final = {"imageLayoutVersion": "1.0.0"}
_AGAIN: Final = "package the checkpoint again, or pull the image again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """An opened layout; `index` is its index.json."""

    directory: Path
    index: Index

    @classmethod
    def open(cls, directory: Path) -> Layout:
        """Read `oci-layout` and `index.json` of `directory`.

        Raises:
            RegistryError: it is no OCI image layout of version 1.
        """
        marker = parse_json(_read(directory / "oci-layout", directory), origin=str(directory / "oci-layout"))
        if marker.get("imageLayoutVersion") != "1.0.0":
            raise RegistryError(
                f"{directory} is an OCI layout of version {marker.get('imageLayoutVersion')!r}, not 1.0.0"
            )
        path = directory / "index.json"
        return cls(directory=directory, index=Index.parse(_read(path, directory), origin=str(path)))

    @property
    def root(self) -> Descriptor:
        """The one image that the layout holds: an index or a manifest.

        Raises:
            RegistryError: it holds none, or several.
        """
        if len(self.index.manifests) != 1:
            raise RegistryError(
                f"{self.directory} holds {len(self.index.manifests)} images where one is wanted",
                hint="skopeo copy oci:LAYOUT:NAME oci:OTHER takes one of them out",
            )
        return self.index.manifests[0]

    def blob_path(self, digest: str) -> Path:
        """Return where the blob of a checked digest lies, or would lie."""
        algorithm, _, encoded = digest.partition(":")
        return self.directory / "blobs" / algorithm / encoded

    def require_blob(self, descriptor: Descriptor) -> Path:
        """Return the path of a blob; raise RegistryError where it is missing or not of the size promised."""
        path = self.blob_path(descriptor.digest)
        if not path.is_file():
            raise RegistryError(f"{self.directory} lacks the blob {descriptor.digest}", hint=_AGAIN)
        size = path.stat().st_size
        if size != descriptor.size_bytes:
            raise RegistryError(f"{path} has {size} bytes, its descriptor says {descriptor.size_bytes}", hint=_AGAIN)
        return path

    def read_blob(self, descriptor: Descriptor) -> bytes:
        """Return the bytes of a small blob (a document of at most 4 MiB), checked against size and digest.

        Raises:
            RegistryError: it is missing, larger, or its bytes are not those of its digest.
        """
        if descriptor.size_bytes > MAX_DOCUMENT_BYTES:
            raise RegistryError(f"{descriptor.digest} has {descriptor.size_bytes} bytes; documents have 4 MiB at most")
        data = self.require_blob(descriptor).read_bytes()
        if sha256_digest(data) != descriptor.digest:
            raise RegistryError(
                f"{self.blob_path(descriptor.digest)} is damaged: its bytes have another digest", hint=_AGAIN
            )
        return data

    def read_manifest(self, descriptor: Descriptor) -> Manifest:
        """Return the manifest that `descriptor` names; raise RegistryError where it is none."""
        return Manifest.parse(self.read_blob(descriptor), origin=descriptor.digest)

    def read_index(self, descriptor: Descriptor) -> Index:
        """Return the index that `descriptor` names; raise RegistryError where it is none."""
        return Index.parse(self.read_blob(descriptor), origin=descriptor.digest)

    def manifests(self, root: Descriptor | None = None) -> list[tuple[Descriptor, Manifest]]:
        """Return every manifest below `root` (the layout's one image unless given), in the order of its index.

        Raises:
            RegistryError: a document is missing or broken, or an index lies inside an index.
        """
        root = root or self.root
        if root.media_type in MANIFEST_TYPES:
            return [(root, self.read_manifest(root))]
        if root.media_type not in INDEX_TYPES:
            raise RegistryError(f"{root.digest} is {root.media_type}, neither an image index nor a manifest")
        return [(descriptor, self.read_manifest(descriptor)) for descriptor in self.read_index(root).manifests]


class BlobSink:
    """Takes a blob piece by piece, and knows the digest of what it took."""

    def __init__(self, stream: IO[bytes]) -> None:
        """Begin an empty blob in `stream`."""
        self._stream = stream
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """The digest of all that was written."""
        return f"sha256:{self._hash.hexdigest()}"

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self._hash.update(data)
        self._stream.write(data)


class LayoutWriter:
    """Writes blobs into a layout that `create_layout` finishes. Several threads may write at once."""

    def __init__(self, directory: Path) -> None:
        """Prepare the empty `directory`."""
        self.directory = directory
        self._blobs = directory / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        self._images: list[Descriptor] = []

    def write_document(self, data: bytes) -> str:
        """Write a blob held in memory and return its digest."""
        digest = sha256_digest(data)
        (self._blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return digest

    def write_stream(self, chunks: Iterable[bytes], advance: Callable[[int], None] | None = None) -> str:
        """Write a blob piece by piece, hashing on the way, and return its digest.

        Args:
            chunks: the blob's bytes, in order.
            advance: told the size in bytes of each piece once it is written.
        """
        with self.open_blob() as blob:
            for chunk in chunks:
                blob.write(chunk)
                if advance:
                    advance(len(chunk))
        return blob.digest

    @contextmanager
    def open_blob(self) -> Iterator[BlobSink]:
        """Yield what takes a blob's bytes; the blob is in the layout when the block ends without an error."""
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".partial-", delete=False) as stream:
            sink = BlobSink(stream)
            yield sink
        Path(stream.name).rename(self._blobs / sink.digest.removeprefix("sha256:"))

    def add_image(self, descriptor: Descriptor) -> None:
        """List an index or a manifest, whose blobs are all written, in index.json."""
        self._images.append(descriptor)

    def finish(self) -> None:
        """Write the two files that make the directory a layout."""
        (self.directory / "index.json").write_bytes(Index(manifests=tuple(self._images)).encode())
        (self.directory / "oci-layout").write_bytes(encode_json(_MARKER))


@contextmanager
def create_layout(target: Path) -> Iterator[LayoutWriter]:
    """Yield a writer whose layout becomes `target` when the block ends without an error; otherwise nothing stays.

    Raises:
        InvalidUsageError: `target` exists already and is not an empty directory.
    """
    with staged_directory(target) as staging:
        writer = LayoutWriter(staging)
        yield writer
        writer.finish()


def hash_stream(chunks: Iterable[bytes], advance: Callable[[int], None] | None = None) -> str:
    """Return the digest of a blob that comes in pieces; `advance` is told the size in bytes of each."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
        if advance:
            advance(len(chunk))
    return f"sha256:{state.hexdigest()}"


def _read(path: Path, directory: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_DOCUMENT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RegistryError(
            f"{directory} is no OCI image layout: it has no {path.name}", hint="gemma-pack package DIR makes one"
        ) from error
