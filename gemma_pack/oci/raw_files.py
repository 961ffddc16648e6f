"""The layers of an artifact on their way to disk: each is a file as it is, checked while it arrives.

A layer without its name is as good as its bytes, so it is kept by its digest and gets its place below the checkpoint's
directory only when all of it was right. What an earlier process left is read back, hashed, and gone on from.

    HEX.raw.partial/file   private as yet
    HEX.raw/file           when the digest was right
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from typing import IO, TYPE_CHECKING, Final

from gemma_pack.errors import RegistryError
from gemma_pack.oci.arrival import Arrival, write_all
from gemma_pack.oci.extraction import MAX_FILES, is_raw
from gemma_pack.oci.layers import MODELS_DIRECTORY
from gemma_pack.oci.tar_reader import place

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path, PurePosixPath

    from gemma_pack.oci.manifest import Descriptor, Manifest

FILEPATH: Final = "org.cncf.model.filepath"
_PIECE_BYTES: Final = 1 << 20


class RawExtraction(Arrival):
    """Writes one raw layer into a directory of its own."""

    _stream: IO[bytes] | None

    def __init__(self, parent: Path, layer: Descriptor, title: str) -> None:
        """Prepare to write `layer` below `parent`; nothing is written yet. `title` names it in errors."""
        super().__init__(parent, layer, title, suffix=".raw")

    def restore(self) -> int:
        """Read back what an earlier process left, and return the offset from which to go on."""
        try:
            self._stream = (self._partial / "file").open("r+b", buffering=0)
        except FileNotFoundError:
            self.discard()
            return 0
        while data := self._stream.read(_PIECE_BYTES):
            self._count(data)
        if self.offset > self.layer.size_bytes:
            self.discard()
        return self.offset

    def write(self, data: bytes) -> None:
        """Take the next bytes of the layer; raise RegistryError where they are more than its descriptor says."""
        self._require_room(data)
        self._stream = self._stream or self._create()
        self._count(data)
        write_all(self._stream, data)

    def finish(self) -> bool:
        """Give the layer its final name and return True, if all its bytes were right; else discard it."""
        if not self._is_right():
            self.discard()
            return False
        self._stream = self._stream or self._create()  # there is none yet for a file of no bytes
        os.fsync(self._stream.fileno())  # the final name, taken on trust later, must not outlive its bytes
        self._close()
        self._partial.rename(self.done)
        return True

    def _begin(self) -> None:
        super()._begin()
        self._stream = None

    def _create(self) -> IO[bytes]:
        self._partial.mkdir(parents=True, exist_ok=True)
        return (self._partial / "file").open("w+b", buffering=0)

    def _close(self) -> None:
        if self._stream:
            self._stream.close()
        self._stream = None


def raw_paths(manifest: Manifest, origin: str) -> dict[str, list[PurePosixPath]]:
    """Return where the raw layers of an artifact go below the checkpoint's directory, by the hex of their digests.

    Raises:
        RegistryError: a layer has no title or two, its path leads elsewhere, or two layers have one path.
    """
    paths: dict[str, list[PurePosixPath]] = {}
    for layer in manifest.layers:
        if is_raw(layer.media_type):
            paths.setdefault(layer.hex, []).append(_raw_path(layer, f"{origin}: layer {layer.digest}"))
    counts = Counter(str(path) for found in paths.values() for path in found)
    if counts.total() > MAX_FILES:
        raise RegistryError(f"{origin} holds more than {MAX_FILES} files")
    for path, count in counts.items():
        if count > 1:
            raise RegistryError(f"{origin} holds {path} twice", hint="build the artifact again, from one directory")
    return paths


def place_raw(stored: Path, image: Path, paths: Sequence[PurePosixPath], origin: str) -> None:
    """Move a layer to its paths below `image`. A second run finds it moved, if that was the last thing done."""
    if not stored.exists() and (image / paths[-1]).is_file():
        return
    try:
        for path in paths:
            (image / path).parent.mkdir(parents=True, exist_ok=True)
        for path in paths[:-1]:
            shutil.copyfile(stored, image / path)
        stored.replace(image / paths[-1])
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise RegistryError(
            f"{origin} holds {_listed(paths)} both as a file and as a directory",
            hint="build the artifact again, from one directory",
        ) from error


def _raw_path(layer: Descriptor, origin: str) -> PurePosixPath:
    names = {name for name in (layer.title, layer.annotations.get(FILEPATH)) if name}
    if len(names) != 1:
        said = f"two names, {_listed(sorted(names))}" if names else "no title"
        raise RegistryError(f"{origin} has {said}, so there is no place for it", hint="package the model again")
    name = names.pop()
    if name.startswith("/") or name.endswith("/"):
        raise RegistryError(f"{origin} holds a path that leaves the image: {name[:200]!a}", hint="do not trust it")
    path = place(f"{MODELS_DIRECTORY}/{name}", origin)
    if not path or not path.parts:
        raise RegistryError(f"{origin} holds a file name that cannot be used: {name[:200]!a}")
    return path


def _listed(names: Iterable[object]) -> str:
    return " and ".join(ascii(str(name)[:200]) for name in names)
