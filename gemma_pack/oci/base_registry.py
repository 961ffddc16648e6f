"""A base image from a registry, kept in the cache as an OCI layout under its digest.

A tag is looked up each time, since it may move; what it names is fetched once. A base that is named by its digest needs
no network the second time.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from gemma_pack.disk import cache_directory
from gemma_pack.errors import InvalidUsageError, RegistryError
from gemma_pack.oci.layout import create_layout
from gemma_pack.oci.manifest import INDEX_TYPES, MANIFEST_TYPES, Index, Manifest
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.source import IMAGE_NAME, RegistrySource, iter_blob

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gemma_pack.oci.layout import LayoutWriter
    from gemma_pack.oci.manifest import Descriptor, Document, Platform
    from gemma_pack.oci.source import ImageSource


def names_registry(spec: str) -> bool:
    """Tell whether `spec` begins with the host of a registry, which a path of a directory does not."""
    return bool(re.match(r"(localhost|[\w-]+(\.[\w-]+)+|[\w.-]+:\d+|\[[0-9a-fA-F:]+\](:\d+)?)/", spec))


def keep_base(
    spec: str, platforms: Sequence[Platform] = (), *, plain_http: bool = False, ca_file: Path | None = None
) -> Path:
    """Return the layout that holds the base image `spec`, a reference, for `platforms` or for all that it has.

    Raises:
        InvalidUsageError: `spec` is no reference.
        RegistryError: there is no such image, or it is damaged.
        AccessError: the registry wants a login.
        OfflineError: it cannot be reached.
    """
    reference = parse_reference(spec)
    if reference.digest and (kept := _place(reference.digest, platforms)).is_dir():
        return kept
    with RegistrySource(reference, plain_http=plain_http, ca_file=ca_file) as source:
        root = source.root()
        place = _place(root.descriptor.digest, platforms)
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with create_layout(place) as writer:
                    writer.add_image(_copy(source, root, platforms, writer, name=str(reference)))
            except InvalidUsageError:
                if not place.is_dir():
                    raise  # else another process has brought it meanwhile: the name is its digest
    return place


def _place(digest: str, platforms: Sequence[Platform]) -> Path:
    chosen = "".join(sorted(f"-{platform}".replace("/", "-") for platform in platforms))
    return cache_directory() / "bases" / f"{digest.removeprefix('sha256:')}{chosen}.oci"


def _copy(
    source: ImageSource, root: Document, platforms: Sequence[Platform], writer: LayoutWriter, *, name: str
) -> Descriptor:
    """Copy the image for `platforms` with all its blobs, and return the descriptor of its root, with its name."""
    annotations = {IMAGE_NAME: name}
    if root.descriptor.media_type in MANIFEST_TYPES:
        _copy_manifest(source, root, writer)
        return replace(root.descriptor, annotations=annotations)
    if root.descriptor.media_type not in INDEX_TYPES:
        raise RegistryError(f"{name} is {root.descriptor.media_type or 'of no type'}, not an image")
    index = Index.parse(root.data, origin=name)
    wanted = {(platform.os, platform.architecture) for platform in platforms}
    chosen = tuple(
        one
        for one in index.manifests
        if one.media_type in MANIFEST_TYPES
        and one.platform
        and one.platform.os != "unknown"
        and (not wanted or (one.platform.os, one.platform.architecture) in wanted)
    )
    for descriptor in chosen:
        _copy_manifest(source, source.document(descriptor), writer)
    data = Index(manifests=chosen, media_type=index.media_type).encode()
    digest = writer.write_document(data)
    return replace(root.descriptor, digest=digest, size_bytes=len(data), annotations=annotations)


def _copy_manifest(source: ImageSource, document: Document, writer: LayoutWriter) -> None:
    writer.write_document(document.data)
    manifest = Manifest.parse(document.data, origin=document.descriptor.digest)
    for blob in (manifest.config, *manifest.layers):
        if writer.write_stream(iter_blob(source, blob)) != blob.digest:
            raise RegistryError(f"{source.name} is damaged: the bytes of {blob.digest} have another digest")
