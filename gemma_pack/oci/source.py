"""Where an image is read from: a registry or a layout on disk, asked in the same way.

A root is resolved once, to a digest; from then on everything is asked for by digest, so a tag that moves
meanwhile changes nothing.
"""

from __future__ import annotations

import shlex
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from gemma_pack.errors import InvalidUsageError, RegistryError
from gemma_pack.oci.client import BlobStream, RegistryClient
from gemma_pack.oci.layers import read_file
from gemma_pack.oci.layout import Layout
from gemma_pack.oci.manifest import INDEX_TYPES, MANIFEST_TYPES, Descriptor, Document, Index, Manifest, Platform
from gemma_pack.oci.reference import Reference, parse_reference
from gemma_pack.oci.retry import PROGRESS_BYTES, AnswerError, Patience, Retry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

IMAGE_NAME: Final = "io.containerd.image.name"
"""Annotation of an image in a layout's index.json: the reference that it was copied from, as containerd writes it."""
DEFAULT_PLATFORM: Final = Platform("linux", "amd64")
"""The weights are the same for all."""


class ImageSource(Protocol):
    """What reading an image needs of a registry or a layout."""

    patience: Patience

    @property
    def name(self) -> str:
        """What to call the image in messages."""

    def root(self) -> Document:
        """Return the index or manifest that is asked for."""

    def document(self, descriptor: Descriptor) -> Document:
        """Return the index or manifest that `descriptor` names, checked against its digest."""

    def blob_size(self, digest: str) -> int | None:
        """Return the size in bytes of a blob that is there, else None."""

    def open_blob(self, digest: str, start: int = 0, end: int | None = None) -> AbstractContextManager[BlobStream]:
        """Open a blob from offset `start` up to `end`."""


class RegistrySource(RegistryClient):
    """The image that a reference names."""

    @property
    def name(self) -> str:
        """The reference."""
        return str(self.reference)

    def root(self) -> Document:
        """Return the index or manifest under the reference's digest or tag."""
        return self.manifest(self.reference.target)

    def document(self, descriptor: Descriptor) -> Document:
        """Return the index or manifest that `descriptor` names."""
        return self.manifest(descriptor.digest)


class LayoutSource:
    """The one image of a layout."""

    def __init__(self, directory: Path) -> None:
        """Open the layout; raise RegistryError where it is none."""
        self.layout = Layout.open(directory)
        self.patience = Patience(Retry(attempts=1))

    @property
    def name(self) -> str:
        """The layout's path."""
        return str(self.layout.directory)

    def root(self) -> Document:
        """Return the index or manifest of the layout's image."""
        return self.document(self.layout.root)

    def document(self, descriptor: Descriptor) -> Document:
        """Return the index or manifest that `descriptor` names."""
        return Document(descriptor=descriptor, data=self.layout.read_blob(descriptor))

    def blob_size(self, digest: str) -> int | None:
        """Return the size in bytes of a blob that the layout has, else None."""
        path = self.layout.blob_path(digest)
        return path.stat().st_size if path.is_file() else None

    @contextmanager
    def open_blob(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[BlobStream]:
        """Open a blob from offset `start` on; like a registry that ignores it, `end` is the reader's to keep."""
        del end
        path = self.layout.blob_path(digest)
        if not path.is_file():
            raise RegistryError(f"{self.name} lacks the blob {digest}", hint="package or copy the image again")
        yield BlobStream(start, read_file(path, path.stat().st_size, start))


def registry_reference(text: str) -> Reference:
    """Return the image in a registry that `text` names.

    Raises:
        InvalidUsageError: it is misspelt, or lies on this machine.
    """
    if Path(text).exists():
        raise InvalidUsageError(
            f"{text} lies on this machine, and an image in a registry is wanted",
            hint=f"gemma-pack push {shlex.quote(text)} REGISTRY/NAME:TAG puts it there",
        )
    return parse_reference(text)


@contextmanager
def open_source(
    image: Path | Reference | str,
    *,
    plain_http: bool = False,
    ca_file: Path | None = None,
    retry: Retry | None = None,
) -> Iterator[LayoutSource | RegistrySource]:
    """Open what `image` names: a layout where there is one at that path, else a reference.

    Raises:
        InvalidUsageError: it is neither.
        RegistryError: the layout is broken.
    """
    if not isinstance(image, Reference) and is_layout(Path(image)):
        yield LayoutSource(Path(image))
        return
    if isinstance(image, Path) or (isinstance(image, str) and Path(image).exists()):
        raise InvalidUsageError(f"{image} is not an OCI layout", hint="gemma-pack package DIR makes one")
    if isinstance(image, str) and (image.endswith(".oci") or image.startswith(("/", "./", "../"))):
        raise InvalidUsageError(f"there is no OCI layout {image}", hint="gemma-pack package DIR makes one")
    reference = parse_reference(image) if isinstance(image, str) else image
    if isinstance(image, str) and "/" not in image:  # a misspelt path; Docker Hub's own images hold no models
        raise InvalidUsageError(
            f"there is no OCI layout {image} here, and {image} names no registry",
            hint="gemma-pack package DIR makes a layout; in a registry an image is host[:port]/name[:tag]",
        )
    with RegistrySource(reference, plain_http=plain_http, ca_file=ca_file, retry=retry) as source:
        yield source


def iter_blob(source: ImageSource, blob: Descriptor) -> Iterator[bytes]:
    """Yield the bytes of a blob, going on where a connection broke; whether they are the right ones, the caller sees.

    Raises:
        RegistryError: there is no such blob, it is not of the size promised, or patience ended.
    """
    offset, attempt = 0, 1
    while offset < blob.size_bytes:
        before = offset
        try:
            with source.open_blob(blob.digest, offset) as stream:
                skip = offset - stream.offset  # sent again by a registry that knows no ranges
                for piece in stream.pieces:
                    if source.patience.stop.is_set():
                        raise AnswerError("stopped, because another part failed")
                    fresh, skip = piece[skip:], max(0, skip - len(piece))
                    offset += len(fresh)
                    if offset > blob.size_bytes:
                        raise RegistryError(f"{source.name}: {blob.digest} has more than its {blob.size_bytes} bytes")
                    yield fresh
            if offset < blob.size_bytes:
                raise AnswerError(f"{blob.digest} ended after {offset} bytes")
        except AnswerError as error:
            if not error.transient:
                raise
            attempt = 1 if offset >= before + PROGRESS_BYTES else attempt
            source.patience.pause(attempt, error)
            attempt += 1


def is_layout(path: Path) -> bool:
    """Tell an OCI layout from any other directory."""
    return (path / "oci-layout").is_file()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """An image, found and pinned: what was asked for, and its manifest for one platform."""

    root: Descriptor
    descriptor: Descriptor
    manifest: Manifest
    platforms: tuple[Platform, ...]
    """All that the root has; empty where it does not say."""


def resolve(source: ImageSource, platform: Platform | None = None) -> Resolved:
    """Find the manifest for `platform`; an image that is not for several platforms is taken as it is.

    The checkpoint is the same for all, so without `platform` any of them serves, the usual one first.

    Raises:
        RegistryError: there is no such image, or it is broken.
        InvalidUsageError: it is not for `platform`.
    """
    root = source.root()
    if root.descriptor.media_type in MANIFEST_TYPES:
        manifest = Manifest.parse(root.data, origin=source.name)
        return Resolved(root=root.descriptor, descriptor=root.descriptor, manifest=manifest, platforms=())
    if root.descriptor.media_type not in INDEX_TYPES:
        raise RegistryError(f"{source.name} is {root.descriptor.media_type or 'of no type'}, not an image")
    index = Index.parse(root.data, origin=source.name)
    manifests = [one for one in index.manifests if one.media_type in MANIFEST_TYPES and not one.artifact_type]
    chosen = _choose(manifests, platform, source.name)
    data = source.document(chosen).data
    return Resolved(
        root=root.descriptor,
        descriptor=chosen,
        manifest=Manifest.parse(data, origin=chosen.digest),
        platforms=tuple(one.platform for one in manifests if one.platform),
    )


def _choose(manifests: list[Descriptor], platform: Platform | None, name: str) -> Descriptor:
    if platform is None and manifests:
        return min(manifests, key=lambda one: one.platform != DEFAULT_PLATFORM)
    platform = platform or DEFAULT_PLATFORM
    exact = [one for one in manifests if one.platform == platform]
    alike = [
        one
        for one in manifests
        if one.platform
        and not platform.variant
        and (one.platform.os, one.platform.architecture) == (platform.os, platform.architecture)
    ]
    unsaid = manifests if len(manifests) == 1 and manifests[0].platform is None else []
    for found in (exact, alike, unsaid):
        if found:
            return found[0]
    known = ", ".join(sorted({str(one.platform) for one in manifests if one.platform})) or "none at all"
    raise InvalidUsageError(f"{name} is not for {platform}; it is for {known}", hint="choose one with --platform")
