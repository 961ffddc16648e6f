"""The files of a checkpoint and their digests, out of a directory or an image: what a signature of the model is over.

Every byte is read. The layers of an image lie over one another: of two files at one path the later counts.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from gemma_pack.checkpoint import Checkpoint, file_sha256
from gemma_pack.oci.extraction import GZIP_TYPES, Gunzip, is_raw, require_known
from gemma_pack.oci.layers import MODELS_DIRECTORY, group_entries
from gemma_pack.oci.source import LayoutSource, is_layout, resolve
from gemma_pack.oci.tar_reader import TarReader, place
from gemma_pack.record import FileDigest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.oci.manifest import Descriptor
    from gemma_pack.oci.source import ImageSource
    from gemma_pack.oci.tar_reader import Member


def file_digests(source: Path, reporter: Reporter) -> tuple[FileDigest, ...]:
    """Return the files of the checkpoint in a layout or a directory, as an image of it holds them, sorted by path.

    Raises:
        CheckpointError: the directory holds what must not go into an image.
        RegistryError: the layout is broken.
    """
    if not is_layout(source):
        return _of_directory(source, reporter)
    image = LayoutSource(source)
    layers = resolve(image).manifest.layers
    files: dict[str, FileDigest] = {}
    with reporter.progress("hashing files", sum(layer.size_bytes for layer in layers), "bytes") as task:
        for layer in layers:
            files |= {file.path: file for file in _of_layer(image, layer)}
            task.advance(layer.size_bytes)
    return tuple(sorted(files.values(), key=lambda file: file.path))


def _of_directory(directory: Path, reporter: Reporter) -> tuple[FileDigest, ...]:
    entries = [entry for group in group_entries(Checkpoint.open(directory)).values() for entry in group]
    with reporter.progress("hashing files", sum(entry.size_bytes for entry in entries), "bytes") as task:
        files = [
            FileDigest(
                path=entry.name.removeprefix(f"{MODELS_DIRECTORY}/"),
                sha256=file_sha256(entry.source, task.advance),
                size_bytes=entry.size_bytes,
            )
            for entry in entries
            if entry.source
        ]
    return tuple(sorted(files, key=lambda file: file.path))


def _of_layer(image: ImageSource, layer: Descriptor) -> Iterator[FileDigest]:
    origin = f"{image.name}: layer {layer.digest}"
    if is_raw(layer.media_type):
        yield FileDigest(path=layer.title or layer.digest, sha256=layer.hex, size_bytes=layer.size_bytes)
        return
    require_known(layer, origin)
    gunzip = Gunzip(layer.size_bytes, origin) if layer.media_type in GZIP_TYPES else None
    follower = _Follower(origin)
    with image.open_blob(layer.digest) as stream:
        for data in stream.pieces:
            for piece in gunzip.feed(data) if gunzip else (data,):
                yield from follower.follow(piece)


class _Follower:
    """Follows a tar and hashes the files below /models."""

    def __init__(self, origin: str) -> None:
        self._tar = TarReader(origin)
        self._member: Member | None = None
        self._state = hashlib.sha256()

    def follow(self, data: bytes) -> Iterator[FileDigest]:
        """Take the next bytes of the tar, and yield the files that end in them."""
        view = memoryview(data)
        while view:
            run = view[: self._tar.left]
            in_content = self._tar.in_content
            if in_content:
                self._state.update(run)
            member = self._tar.feed(run)
            if member:
                self._member, self._state = member, hashlib.sha256()
            if self._member and not self._tar.in_content and (member or in_content):
                yield from self._ended(self._member)
            view = view[len(run) :]

    def _ended(self, member: Member) -> Iterator[FileDigest]:
        path = place(member.name, self._tar.origin) if member.kind == "file" else None
        if path:
            yield FileDigest(path=str(path), sha256=self._state.hexdigest(), size_bytes=member.size_bytes)
        self._member = None
