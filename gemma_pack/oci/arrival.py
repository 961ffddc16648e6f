"""What the layers that arrive have in common, tar or raw file: counted, hashed, and named only when all was right."""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from typing import IO, TYPE_CHECKING, Final, Self

from gemma_pack.errors import RegistryError

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.oci.manifest import Descriptor


PUT_AGAIN: Final = "push it again; a layout on this machine is removed first, and packaged again"
"""The remedy for an image whose bytes are not those of its digests."""


class Arrival(ABC):
    """One layer on its way to a directory of its own. Use it as a context, which closes its files.

    Attributes:
        layer: what its manifest says of it.
        title: names it in errors.
        done: where it lies when all of its bytes were right.
        offset: bytes of the layer that are there.
    """

    def __init__(self, parent: Path, layer: Descriptor, title: str, *, suffix: str = "") -> None:
        """Prepare to write `layer` below `parent`; nothing is written yet. `suffix` ends its directory's name."""
        self.layer = layer
        self.title = title
        self.done = parent / f"{layer.hex}{suffix}"
        self._partial = parent / f"{layer.hex}{suffix}.partial"
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def discard(self) -> None:
        """Remove what there is of the layer and begin again."""
        self._close()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._begin()

    @abstractmethod
    def restore(self) -> int:
        """Read back what an earlier process left, and return the offset in the layer from which to go on."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Take the next bytes of the layer as it is stored; raise RegistryError where they cannot be its own."""

    @abstractmethod
    def finish(self) -> bool:
        """Give the layer its final name and return True, if all its bytes were right; else discard it."""

    def _begin(self) -> None:
        self.offset = 0
        self._hash = hashlib.sha256()

    @abstractmethod
    def _close(self) -> None:
        """Close what is open."""

    def _count(self, data: bytes) -> None:
        self._hash.update(data)
        self.offset += len(data)

    def _require_room(self, data: bytes) -> None:
        """Raise RegistryError where `data` goes beyond the end that the descriptor promises."""
        if self.offset + len(data) > self.layer.size_bytes:
            raise RegistryError(f"{self.title} has more than the {self.layer.size_bytes} bytes that its image says")

    def _is_right(self) -> bool:
        """Say whether all bytes are there and have the layer's digest."""
        return self.offset == self.layer.size_bytes and self._hash.hexdigest() == self.layer.hex


def write_all(stream: IO[bytes], data: bytes | memoryview) -> None:
    """Write all of `data` to an unbuffered stream, which may take it in parts."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
