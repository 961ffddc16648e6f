"""One layer on its way to disk: checked and unpacked while it arrives, and taken up again after a crash.

A file under /models is written straight to its place, so weights are on the disk once. Everything else of the layer
(headers, padding, the files of a base image; of a gzipped layer all of it) goes to a journal beside them. Files and
journal together are the layer again: a later process reads them back, hashes them, and goes on where they end. A layer
gets its final name only if all of its bytes had the right digest.

    HEX.partial/journal    what is not in a file
    HEX.partial/files/     the checkpoint's files, private as yet
    HEX/files/             the same, when the digest was right
"""

from __future__ import annotations

import os
import zlib
from typing import IO, TYPE_CHECKING, Final

from gemma_pack.errors import RegistryError
from gemma_pack.oci.arrival import Arrival, write_all
from gemma_pack.oci.manifest import GZIP_LAYER_TYPE, LAYER_TYPE
from gemma_pack.oci.tar_reader import Member, TarReader, place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import PurePosixPath

    from gemma_pack.oci.manifest import Descriptor

_DOCKER: Final = "application/vnd.docker.image.rootfs.diff.tar"
PLAIN_TYPES: Final = frozenset({LAYER_TYPE, _DOCKER})
GZIP_TYPES: Final = frozenset({GZIP_LAYER_TYPE, _DOCKER + ".gzip"})
MAX_FILES: Final = 10_000
"""Of one layer, under /models."""
MAX_GZIP_RATIO: Final = 100
"""Weights shrink by a fifth, text to a fifth; what grows hundredfold was made to fill a disk."""
_PIECE_BYTES: Final = 1 << 20


def is_raw(media_type: str) -> bool:
    """Whether a layer is a file as it is (ModelPack, model-spec: `…weight.v1.raw`, `…doc.v1.raw`)."""
    return media_type.endswith(".raw")


def require_known(layer: Descriptor, origin: str) -> None:
    """Raise RegistryError for a layer that is neither a tar, nor a gzipped tar, nor a raw file."""
    if layer.media_type in PLAIN_TYPES | GZIP_TYPES or is_raw(layer.media_type):
        return
    if layer.media_type.endswith("zstd"):
        raise RegistryError(
            f"{origin} is compressed with zstd, which neither KServe nor this command reads",
            hint="build it with uncompressed layers, as gemma-pack package does",
        )
    raise RegistryError(
        f"{origin} holds {layer.media_type}, neither the tar of a container image nor a file of a model",
        hint="name a modelcar image, or an artifact of raw files",
    )


class Gunzip:
    """Inflates a gzip stream as it comes, member after member, in bounded pieces."""

    def __init__(self, size_bytes: int, origin: str) -> None:
        """Prepare for a stream of `size_bytes`; `origin` names it in errors."""
        self.limit_bytes = MAX_GZIP_RATIO * size_bytes + _PIECE_BYTES
        """How many more bytes it may inflate to."""
        self.may_end = False
        self._origin = origin
        self._inflate = zlib.decompressobj(wbits=31)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` inflates to, at most 1 MiB at a time.

        Raises:
            RegistryError: it is damaged, or inflates beyond reason.
        """
        while data := data.lstrip(b"\0") if self.may_end else data:  # zeros may fill the last block
            try:
                piece = self._inflate.decompress(data, _PIECE_BYTES)
            except zlib.error as error:
                raise RegistryError(
                    f"{self._origin} is damaged: it does not decompress", hint="push or copy the image again"
                ) from error
            self.limit_bytes -= len(piece)
            if self.limit_bytes < 0:
                raise RegistryError(f"{self._origin} grows more than {MAX_GZIP_RATIO}-fold when decompressed")
            yield piece
            data = self._inflate.unconsumed_tail
            self.may_end = self._inflate.eof
            if self.may_end:  # another gzip member may follow
                data = self._inflate.unused_data
                self._inflate = zlib.decompressobj(wbits=31)


class LayerExtraction(Arrival):
    """Unpacks one layer into a directory of its own."""

    _journal: IO[bytes] | None
    _sink: IO[bytes] | None

    def restore(self) -> int:
        """Read back what an earlier process left, and return the offset in the layer from which to go on.

        What cannot be read back is discarded.
        """
        try:
            self._journal = (self._partial / "journal").open("r+b", buffering=0)
        except FileNotFoundError:
            self.discard()
            return 0
        try:
            self._read_back(self._journal)
        except RegistryError:
            self.discard()
        return self.offset

    def write(self, data: bytes) -> None:
        """Take the next bytes of the layer as it is stored.

        Raises:
            RegistryError: they are more than its descriptor says, or hold what must not be unpacked.
        """
        self._require_room(data)
        self._journal = self._journal or self._create()
        self._count(data)
        if self._gunzip:
            write_all(self._journal, data)
            for piece in self._gunzip.feed(data):
                self._unpack(piece)
        else:
            self._unpack(data, self._journal)

    def finish(self) -> bool:
        """Give the layer its final name and return True, if all its bytes were right; else discard it.

        Raises:
            RegistryError: the bytes are those of the digest, and no whole tar.
        """
        if not self._is_right():
            self.discard()
            return False
        if not self._reader.may_end or (self._gunzip and not self._gunzip.may_end):
            raise RegistryError(f"{self.title} ends in the middle of a file")
        self._journal = self._journal or self._create()  # there is none yet for a layer of no bytes
        self._close()
        (self._partial / "journal").unlink()
        self._partial.rename(self.done)
        return True

    def _begin(self) -> None:
        super()._begin()
        self._journal = self._sink = None
        self._reader = TarReader(self.title)
        self._gunzip = Gunzip(self.layer.size_bytes, self.title) if self.layer.media_type in GZIP_TYPES else None
        self._seen: set[PurePosixPath] = set()

    def _create(self) -> IO[bytes]:
        (self._partial / "files").mkdir(parents=True, exist_ok=True)
        return (self._partial / "journal").open("w+b", buffering=0)

    def _read_back(self, journal: IO[bytes]) -> None:
        """Follow journal and files as far as they go; the files of a gzipped layer are written again."""
        if self._gunzip:
            while data := journal.read(_PIECE_BYTES):
                self._count(data)
                for piece in self._gunzip.feed(data):
                    self._unpack(piece)
        else:
            while run := (self._sink or journal).read(min(self._reader.left, _PIECE_BYTES)):
                self._count(run)
                self._follow(run)
            journal.truncate(journal.tell())

    def _unpack(self, data: bytes, journal: IO[bytes] | None = None) -> None:
        """Send each run of the tar where it belongs: a file, or else the journal."""
        view = memoryview(data)
        while view:
            run = view[: self._reader.left]
            stream = self._sink or journal
            if stream:
                write_all(stream, run)
            self._follow(run)
            view = view[len(run) :]

    def _follow(self, run: bytes | memoryview) -> None:
        """Let the reader see a run of the tar, and open or close the file that begins or ends with it."""
        member = self._reader.feed(run)
        if member:
            self._open(member)
        elif self._sink and not self._reader.in_content:
            self._sink.truncate()  # nothing of another try lies behind
            os.fsync(self._sink.fileno())  # the layer's final name, taken on trust later, must not outlive its bytes
            self._sink.close()
            self._sink = None

    def _open(self, member: Member) -> None:
        path = place(member.name, self.title)
        room = self._gunzip.limit_bytes if self._gunzip else self.layer.size_bytes - member.offset
        if member.size_bytes > room:
            raise RegistryError(f"{self.title} promises {member.size_bytes} bytes for a file, and cannot hold them")
        if path is None:
            return
        if member.kind == "other" or (not path.parts and member.kind != "directory"):
            raise RegistryError(
                f"{self.title} holds something in /models that is neither a file nor a directory: {member.name!a}",
                hint="links and devices are not unpacked; build the image from files",
            )
        if path in self._seen and member.kind == "file":
            raise RegistryError(f"{self.title} holds {path} twice")
        self._seen.add(path)
        if len(self._seen) > MAX_FILES:
            raise RegistryError(f"{self.title} holds more than {MAX_FILES} files")
        self._make(path, member)

    def _make(self, path: PurePosixPath, member: Member) -> None:
        target = self._partial / "files" / path
        try:
            if member.kind == "directory":
                target.mkdir(parents=True, exist_ok=True)
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise RegistryError(f"{self.title} holds {path} both as a file and as a directory") from error
        if member.size_bytes:
            self._sink = os.fdopen(descriptor, "r+b", buffering=0)
        else:
            os.close(descriptor)

    def _close(self) -> None:
        for stream in (self._journal, self._sink):
            if stream:
                stream.close()
        self._journal = self._sink = None
