"""Looking into layers without fetching them: which members a tar has, and the few bytes of it that are wanted.

A tar header says how long a file is, so the walk goes from header to header and asks the registry for little more than
those. Of a safetensors file its header is read and no tensor. A gzipped layer has no such shortcut: it is
inflated from its start, and left where a shard begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from gemma_pack.errors import RegistryError
from gemma_pack.oci.arrival import PUT_AGAIN
from gemma_pack.oci.extraction import GZIP_TYPES, Gunzip
from gemma_pack.oci.manifest import sha256_digest
from gemma_pack.oci.tar_header import END
from gemma_pack.oci.tar_reader import TarReader
from gemma_pack.safetensors_file import LENGTH_BYTES, header_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gemma_pack.oci.manifest import Descriptor
    from gemma_pack.oci.source import ImageSource
    from gemma_pack.oci.tar_reader import Member

    Wanted = Callable[[Member], "Part | None"]

Part = Literal["whole", "header"]
"""What to read of a member: all of it, or the header of a safetensors file."""

WINDOW_BYTES: Final = 8 << 10
"""Asked for at a time: tar header and safetensors header of a shard of medium size."""
MAX_WINDOW_BYTES: Final = 1 << 20
"""Where a layer has to be read from end to end."""
MAX_SMALL_BYTES: Final = 4 << 20
"""Of a file that is read; configs have kilobytes, records with every tensor's name less than a megabyte."""
MAX_HEADER_BYTES: Final = 32 << 20
"""Of a safetensors header that is read; one that names ten thousand tensors has a megabyte."""
MAX_MEMBERS: Final = 100_000
"""Of one layer; a base image of a whole distribution has some ten thousand."""
MAX_INFLATED_BYTES: Final = 64 << 20
"""Of a file in a gzipped layer that is read over, because there is no other way past it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerContents:
    """What was seen of a layer."""

    members: tuple[Member, ...]
    files: Mapping[str, bytes] = field(repr=False)
    """Of what was wanted, by its member's name: the content, or the header of a safetensors file."""
    complete: bool
    """Whether the layer was followed to its end."""


class BlobReader:
    """Reads parts of an image's blobs, and counts their bytes."""

    def __init__(self, source: ImageSource) -> None:
        """Start with nothing read."""
        self.source = source
        self.bytes_read = 0

    def part(self, blob: Descriptor, start: int, size_bytes: int) -> bytes:
        """Return at most `size_bytes` of a blob from offset `start` on; what the registry sent, unchecked.

        Raises:
            RegistryError: it has no such blob, or a shorter one.
        """
        data = self.source.patience.run(partial(self._part, blob, start, min(blob.size_bytes, start + size_bytes)))
        self.bytes_read += len(data)
        return data

    def whole(self, blob: Descriptor, origin: str) -> bytes:
        """Return a blob; raise RegistryError where its bytes are not those of its digest."""
        data = self.part(blob, 0, blob.size_bytes)
        if sha256_digest(data) != blob.digest:
            raise RegistryError(f"{origin} is damaged: its bytes have another digest", hint=PUT_AGAIN)
        return data

    def _part(self, blob: Descriptor, start: int, end: int) -> bytes:
        """Return a window of a blob, also from a registry that answers with more than it was asked for."""
        with self.source.open_blob(blob.digest, start, end) as stream:
            window = b"".join(_between(stream.pieces, start - stream.offset, end - stream.offset))
        if len(window) != end - start:
            raise RegistryError(f"{self.source.name}: layer {blob.digest} is shorter than the image says")
        return window


def read_tar_layer(
    reader: BlobReader, layer: Descriptor, wanted: Wanted, *, whole_bytes: int, window_bytes: int = WINDOW_BYTES
) -> LayerContents:
    """Walk through the tar of a layer, gzipped or not.

    Args:
        reader: of the image.
        layer: of one of the types that `extraction` knows.
        wanted: asked of each member what to read of it.
        whole_bytes: a layer up to this size is read whole and checked against its digest.
        window_bytes: asked for at first; of a gzipped layer then more and more.

    Raises:
        RegistryError: the layer is damaged, or what is wanted is larger than 4 MiB.
    """
    picker = _Picker(f"{reader.source.name}: layer {layer.digest}", wanted)
    if layer.size_bytes <= whole_bytes:
        data = reader.whole(layer, picker.tar.origin)
        gunzip = Gunzip(layer.size_bytes, picker.tar.origin) if layer.media_type in GZIP_TYPES else None
        for piece in gunzip.feed(data) if gunzip else (data,):
            picker.follow(piece)
        complete = True
    elif layer.media_type in GZIP_TYPES:
        complete = _walk_gzip(reader, layer, picker, window_bytes)
    else:
        complete = _walk_plain(reader, layer, picker, window_bytes)
    return LayerContents(members=tuple(picker.members), files=picker.files, complete=complete)


class _Picker:
    """Follows a tar, notes its members and keeps what is wanted of them."""

    def __init__(self, title: str, wanted: Wanted) -> None:
        self.tar = TarReader(title)
        self.members: list[Member] = []
        self.files: dict[str, bytes] = {}
        self._wanted = wanted
        self._current: tuple[Member, Part] | None = None
        self._limit = 0
        self._content = bytearray()

    @property
    def due_bytes(self) -> int:
        """Bytes of the present member that are still wanted."""
        return self._limit - len(self._content) if self._current else 0

    def window_bytes(self, usual_bytes: int) -> int:
        """Return how much to ask for next: of a safetensors header just the rest, for its tensors come behind it."""
        if self._current and self._current[1] == "header" and self._limit > LENGTH_BYTES:
            return self.due_bytes
        return max(usual_bytes, self.due_bytes)

    @property
    def unwanted_bytes(self) -> int:
        """Bytes left of content that is not wanted."""
        return self.tar.left if self.tar.in_content and not self._current else 0

    def follow(self, data: bytes) -> None:
        """Take the next bytes of the tar."""
        view = memoryview(data)
        while view:
            run = view[: self.tar.left]
            if self._current and self.tar.in_content:
                self._collect(bytes(run))
            member = self.tar.feed(run)
            if member:
                self._begin(member)
            view = view[len(run) :]

    def _begin(self, member: Member) -> None:
        self.members.append(member)
        if len(self.members) > MAX_MEMBERS:
            raise RegistryError(f"{self.tar.origin} holds more than {MAX_MEMBERS} files")
        part = self._wanted(member) if member.kind == "file" else None
        self._current = (member, part) if part else None
        if part == "whole" and member.size_bytes > MAX_SMALL_BYTES:
            name = member.name.rpartition("/")[2]
            raise RegistryError(f"{self.tar.origin} holds a {name} of {member.size_bytes} bytes, 4 MiB at most")
        self._content.clear()
        self._limit = member.size_bytes if part == "whole" else min(LENGTH_BYTES, member.size_bytes)
        self._collect(b"")

    def _collect(self, run: bytes) -> None:
        while self._current:
            taken, run = run[: self.due_bytes], run[self.due_bytes :]
            self._content += taken
            if self.due_bytes:
                return
            member, part = self._current
            if part == "header" and len(self._content) == LENGTH_BYTES == self._limit:
                self._limit = bounded_header_bytes(bytes(self._content), member.size_bytes, self.tar.origin)
            if not self.due_bytes:
                self.files[member.name], self._current = bytes(self._content), None


def bounded_header_bytes(head: bytes, size_bytes: int, origin: str) -> int:
    """Return how many bytes of a safetensors file its header takes; raise RegistryError above 32 MiB."""
    needed = header_bytes(head, size_bytes)
    if needed > MAX_HEADER_BYTES:
        raise RegistryError(
            f"{origin} holds a safetensors header of {needed} bytes, {MAX_HEADER_BYTES >> 20} MiB at most"
        )
    return needed


def _walk_plain(reader: BlobReader, layer: Descriptor, picker: _Picker, window_bytes: int) -> bool:
    tar = picker.tar
    while tar.offset < layer.size_bytes - len(END) and not tar.ended:  # behind a shard comes only the end mark
        picker.follow(reader.part(layer, tar.offset, picker.window_bytes(window_bytes)))
        if picker.unwanted_bytes:
            tar.skip()
    return True


def _walk_gzip(reader: BlobReader, layer: Descriptor, picker: _Picker, window_bytes: int) -> bool:
    gunzip = Gunzip(layer.size_bytes, picker.tar.origin)
    offset = 0
    while offset < layer.size_bytes and not picker.tar.ended:
        if picker.unwanted_bytes > MAX_INFLATED_BYTES:  # a shard
            return False
        data = reader.part(layer, offset, window_bytes)
        for piece in gunzip.feed(data):
            picker.follow(piece)
        offset += len(data)
        window_bytes = min(2 * window_bytes, MAX_WINDOW_BYTES)
    return True


def _between(pieces: Iterator[bytes], start: int, end: int) -> Iterator[bytes]:
    position = 0
    for piece in pieces:
        yield piece[max(0, start - position) : max(0, end - position)]
        position += len(piece)
        if position > end:  # at `end` itself the answer is over, and read to its end the connection serves again
            return
