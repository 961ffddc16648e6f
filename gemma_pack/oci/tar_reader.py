"""Reading a tar as its bytes come, from whoever wrote it: nothing is believed, nothing is kept but headers.

The standard library's reader pulls, takes extended headers of any size into memory, and cannot be stopped and taken
up again; this one is fed, says what each run of bytes is, and can be told to skip content that was not
fetched. Header blocks themselves are decoded by the standard library.

Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final, Literal

from gemma_pack.errors import RegistryError
from gemma_pack.oci.layers import MODELS_DIRECTORY
from gemma_pack.oci.tar_header import BLOCK

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal["file", "directory", "other"]
State = Literal["header", "extended", "content", "padding", "end"]

MAX_EXTENDED_BYTES: Final = 1 << 20
"""Of a long name or a pax header; real ones have a few hundred bytes."""
MAX_COMPONENT_BYTES: Final = 255
MAX_NAME_LENGTH: Final = 1024
MAX_DEPTH: Final = 32
"""Of directories: ten thousand files, each a thousand directories deep, would fill a disk with those."""

_EXTENDED: Final = frozenset({
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE,
})  # fmt: skip
_LINKS: Final = frozenset({tarfile.LNKTYPE, tarfile.SYMTYPE})
_FILES: Final = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
_HEADER_ONLY: Final = frozenset({
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
})  # fmt: skip
"""Types that no content follows, whatever their size field says."""
_DELETE_MODELS: Final = ([f".wh.{MODELS_DIRECTORY}"], [".wh..wh..opq"])
"""How a layer would delete the whole of /models (OCI image-spec, layer.md, "Whiteouts")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One entry of a tar, as its headers say."""

    name: str
    kind: Kind
    size_bytes: int
    mode: int
    offset: int
    """Where its content begins in the tar."""
    gid: int = 0
    link: str | None = None
    """Where a link points."""
    is_hard_link: bool = False
    has_pax_size: bool = False
    """Whether its size stands in a pax header, as Python's writer has it over 8 GiB."""


class TarReader:
    """Is fed the bytes of a tar in order, in runs that never go beyond `left`."""

    def __init__(self, origin: str) -> None:
        """Start before the first header; `origin` names the tar in errors."""
        self.origin = origin
        self.offset = 0
        self.left = BLOCK
        """Bytes of the present run: of a header, of content or of padding."""
        self._state: State = "header"
        self._gathered = bytearray()
        self._extended: tarfile.TarInfo | None = None
        self._told: dict[str, str] = {}
        self._padding = 0

    @property
    def in_content(self) -> bool:
        """Whether a member's content comes now."""
        return self._state == "content"

    @property
    def ended(self) -> bool:
        """Whether the end mark was read; what follows means nothing."""
        return self._state == "end"

    @property
    def may_end(self) -> bool:
        """Whether the tar may end here: after its end mark or, as some writers have it, before a header."""
        return self.ended or (self._state == "header" and not self._gathered and not self._told)

    def feed(self, run: bytes | memoryview) -> Member | None:
        """Take at most `left` bytes, and return the member whose headers they end, if they do.

        Raises:
            RegistryError: the tar is broken, or has a form that no image of a model needs.
        """
        if self._state in {"header", "extended"}:
            self._gathered += run
        self.offset += len(run)
        self.left -= len(run)
        return None if self.left else self._next()

    def skip(self) -> None:
        """Pass over what is left of content and padding, up to where the next header begins."""
        while self._state in {"content", "padding"}:
            self.offset += self.left
            self._next()

    def _next(self) -> Member | None:
        """Go to the next state, at the end of a run."""
        gathered = bytes(self._gathered)
        self._gathered.clear()
        if self._state == "header":
            return self._header(gathered)
        if self._state == "extended" and self._extended:
            self._note(self._extended, gathered)
        if self._state in {"content", "extended"} and self._padding:
            self._begin("padding", self._padding)
        else:
            self._begin("end" if self.ended else "header", BLOCK)
        return None

    def _begin(self, state: State, size_bytes: int) -> None:
        self._state, self.left = state, size_bytes

    def _header(self, block: bytes) -> Member | None:
        if not any(block):
            self._begin("end", BLOCK)
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise RegistryError(f"{self.origin} is no tar, or damaged, at byte {self.offset - BLOCK}") from error
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise RegistryError(f"{self.origin} holds a sparse file, which is not supported: {_shown(info.name)}")
        if info.type not in _EXTENDED:
            return self._start(info)
        if not 0 < info.size <= MAX_EXTENDED_BYTES:
            raise RegistryError(f"{self.origin} has an extended header of {info.size} bytes")
        self._extended, self._padding = info, -info.size % BLOCK
        self._begin("extended", info.size)
        return None

    def _start(self, info: tarfile.TarInfo) -> Member:
        size = 0 if info.type in _HEADER_ONLY else self._size(info)
        kind: Kind = "file" if info.type in _FILES else "directory" if info.type == tarfile.DIRTYPE else "other"
        name = self._told.get("path", info.name).rstrip("/")
        has_pax_size = "size" in self._told
        self._told = {}
        self._padding = -size % BLOCK
        self._begin("content" if size else "header", size or BLOCK)
        return Member(
            name=name,
            kind=kind,
            size_bytes=size,
            mode=info.mode,
            offset=self.offset,
            gid=info.gid,
            link=info.linkname if info.type in _LINKS else None,
            is_hard_link=info.type == tarfile.LNKTYPE,
            has_pax_size=has_pax_size,
        )

    def _size(self, info: tarfile.TarInfo) -> int:
        text = self._told.get("size")
        size = info.size if text is None else int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        if size < 0:
            raise RegistryError(f"{self.origin} gives {_shown(info.name)} no valid size")
        return size

    def _note(self, info: tarfile.TarInfo, content: bytes) -> None:
        """Keep what an extended header says of the next member's name and size; the rest is of no use here."""
        if info.type == tarfile.GNUTYPE_LONGNAME:
            self._told["path"] = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        if info.type in {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}:
            return
        records = _pax_records(content, self.origin)
        if any(key.startswith("GNU.sparse") for key in records):
            raise RegistryError(f"{self.origin} holds a sparse file, which is not supported")
        told = {key: value for key, value in records.items() if key in {"path", "size"}}
        if info.type == tarfile.XGLTYPE and told:
            raise RegistryError(f"{self.origin} gives all its members one {' and '.join(told)}")
        self._told |= told


def place(name: str, origin: str) -> PurePosixPath | None:
    """Return where a member of a layer goes below the checkpoint's directory; None for what lies outside /models.

    `models` itself gives the path `.`.

    Raises:
        RegistryError: the name is absolute, leads upwards, cannot be a file's, or deletes what lower layers hold.
    """
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if name.startswith("/") or ".." in parts:
        raise RegistryError(f"{origin} holds a path that leaves the image: {_shown(name)}", hint="do not trust it")
    in_models = parts[:1] == [MODELS_DIRECTORY]
    deleted = [part for part in parts if part.startswith(".wh.")]
    if deleted and (in_models or parts in _DELETE_MODELS):
        raise RegistryError(
            f"{origin} deletes files of the layers below it: {_shown(name)}",
            hint="build the image without deleting files, as gemma-pack package does",
        )
    if not in_models:
        return None
    too_long = (
        len(name) > MAX_NAME_LENGTH
        or len(parts) > MAX_DEPTH
        or any(len(os.fsencode(part)) > MAX_COMPONENT_BYTES for part in parts)
    )
    if too_long or not name.isprintable():
        raise RegistryError(f"{origin} holds a file name that cannot be used: {_shown(name)}")
    return PurePosixPath(*parts[1:])


def _pax_records(content: bytes, origin: str) -> Mapping[str, str]:
    """Read the records of a pax header: LENGTH KEY=VALUE and a newline, LENGTH counting the whole record."""
    records: dict[str, str] = {}
    position = 0
    while position < len(content):
        digits, _, _ = content[position : position + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = content[position + len(digits) + 1 : position + length]
        if not record.endswith(b"\n") or b"=" not in record or position + length > len(content):
            raise RegistryError(f"{origin} has a broken pax header")
        key, _, value = record[:-1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position += length
    return records


def _shown(name: str) -> str:
    return ascii(name[:200])
