"""What an image holds, without its weights: its digest, its layers, and the record and config of its checkpoint.

A tar header says how long a file is, so the walk through a layer goes from header to header and asks the registry for
little more than those: a layer with one 5 GB shard costs one small request.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from gemma_pack.checkpoint import RECORD_NAME
from gemma_pack.errors import CheckpointError, RegistryError
from gemma_pack.oci.extraction import GZIP_TYPES, Gunzip, require_known
from gemma_pack.oci.manifest import parse_json, sha256_digest
from gemma_pack.oci.source import DEFAULT_PLATFORM, RegistrySource, open_source, resolve
from gemma_pack.oci.tar_header import END
from gemma_pack.oci.tar_reader import TarReader, place
from gemma_pack.record import Record

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from gemma_pack.oci.manifest import Descriptor, Manifest, Platform
    from gemma_pack.oci.reference import Reference
    from gemma_pack.oci.retry import Retry
    from gemma_pack.oci.source import ImageSource
    from gemma_pack.oci.tar_reader import Member

CONFIG_NAME: Final = "config.json"
WINDOW_BYTES: Final = 64 << 10
"""Asked for at a time: the small files of a checkpoint lie side by side."""
MAX_SMALL_BYTES: Final = 4 << 20
"""Of a file that is read; configs have kilobytes, records with every tensor's name less than a megabyte."""
MAX_INFLATED_BYTES: Final = 64 << 20
"""Of a file in a gzipped layer that is read over, because there is no other way past it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDescription:
    """One layer, as the manifest names it."""

    title: str | None
    media_type: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDescription:
    """An image in a registry or a layout."""

    name: str
    """As it was given: a reference, or the path of a layout."""
    digest: str
    """Of the index or manifest that `name` names: what to pin."""
    pinned: str | None
    """`host/name@digest`; None for a layout."""
    platforms: tuple[str, ...]
    """Empty where the image does not say."""
    size_bytes: int
    """Of config and layers for one platform: what a node fetches."""
    layers: tuple[LayerDescription, ...]
    record: Record | None
    config: Mapping[str, Any]
    """The checkpoint's config.json."""

    @property
    def is_artifact(self) -> bool:
        """Whether its layers are raw files, for ilab and ModelPack, and not the tars of a modelcar."""
        return all(_is_raw(layer.media_type) for layer in self.layers)


def describe(
    image: Path | Reference | str,
    *,
    platform: Platform = DEFAULT_PLATFORM,
    plain_http: bool = False,
    ca_file: Path | None = None,
    retry: Retry | None = None,
) -> ImageDescription:
    """Describe the image that a reference or the path of an OCI layout names; the weights stay where they are.

    Raises:
        InvalidUsageError: `image` is neither, or is not for `platform`.
        RegistryError: there is no such image, or it is damaged.
        CheckpointError: it holds no checkpoint, or a broken record.
        AccessError: the registry wants a login, or another one.
        OfflineError: the registry cannot be reached.
    """
    with open_source(image, plain_http=plain_http, ca_file=ca_file, retry=retry) as source:
        resolved = resolve(source, platform)
        files = read_small_files(source, resolved.manifest, (CONFIG_NAME, RECORD_NAME))
        digest = resolved.root.digest
        pinned = str(source.reference.pinned(digest)) if isinstance(source, RegistrySource) else None
    if CONFIG_NAME not in files:
        raise CheckpointError(
            f"{source.name} has no /models/{CONFIG_NAME}", hint="name a modelcar image, such as gemma-pack push makes"
        )
    manifest = resolved.manifest
    return ImageDescription(
        name=source.name,
        digest=digest,
        pinned=pinned,
        platforms=tuple(map(str, resolved.platforms)),
        size_bytes=sum(blob.size_bytes for blob in (manifest.config, *manifest.layers)),
        layers=tuple(
            LayerDescription(
                title=layer.title, media_type=layer.media_type, digest=layer.digest, size_bytes=layer.size_bytes
            )
            for layer in manifest.layers
        ),
        record=_record(files.get(RECORD_NAME), source.name),
        config=parse_json(files[CONFIG_NAME], origin=f"{source.name}: {CONFIG_NAME}"),
    )


def read_small_files(source: ImageSource, manifest: Manifest, names: Collection[str]) -> dict[str, bytes]:
    """Return those of the files `names`, paths below /models, that an image holds, without fetching its weights.

    In an artifact of raw files each is a layer of its own, found by its title.

    A layer of up to 4 MiB, where `gemma-pack package` puts them, is read whole and checked against its digest. In a
    larger one, as a build with a single COPY makes, the files are what the registry sent.

    Raises:
        RegistryError: a layer is damaged, or one of the files is larger than 4 MiB.
    """
    titled = [layer for layer in manifest.layers if layer.title]  # a base has none, and holds no /models
    files: dict[str, bytes] = {}
    for layer in titled or manifest.layers:
        title = f"{source.name}: layer {layer.digest}"
        if _is_raw(layer.media_type):
            if layer.title in names:
                files[str(layer.title)] = source.patience.run(partial(_read_raw, source, layer, title))
            continue
        require_known(layer, title)
        files |= source.patience.run(partial(_walk, source, layer, title, names))
    return files


class _Picker:
    """Follows a tar and keeps the files that are wanted."""

    def __init__(self, title: str, names: Collection[str]) -> None:
        self.reader = TarReader(title)
        self.files: dict[str, bytes] = {}
        self._names = names
        self._name: str | None = None
        self._content = bytearray()

    @property
    def unwanted_bytes(self) -> int:
        """Bytes left of content that is not wanted."""
        return self.reader.left if self.reader.in_content and self._name is None else 0

    def follow(self, data: bytes) -> None:
        """Take the next bytes of the tar."""
        view = memoryview(data)
        while view:
            run = view[: self.reader.left]
            if self._name is not None and self.reader.in_content:
                self._content += run
            member = self.reader.feed(run)
            if member:
                self._begin(member)
            elif self._name is not None and not self.reader.in_content:
                self.files[self._name], self._name = bytes(self._content), None
            view = view[len(run) :]

    def _begin(self, member: Member) -> None:
        path = place(member.name, self.reader.origin)
        name = str(path) if path and member.kind == "file" else None
        if name not in self._names:
            self._name = None
            return
        if member.size_bytes > MAX_SMALL_BYTES:
            raise RegistryError(f"{self.reader.origin} holds a {name} of {member.size_bytes} bytes, 4 MiB at most")
        self._content.clear()
        self._name = name if member.size_bytes else None
        if name and not member.size_bytes:
            self.files[name] = b""


def _walk(source: ImageSource, layer: Descriptor, title: str, names: Collection[str]) -> dict[str, bytes]:
    picker = _Picker(title, names)
    if layer.size_bytes <= MAX_SMALL_BYTES:
        return _walk_whole(source, layer, picker)
    return (_walk_gzip if layer.media_type in GZIP_TYPES else _walk_plain)(source, layer, picker)


def _is_raw(media_type: str) -> bool:
    """Whether a layer is a file as it is (ModelPack, model-spec: `…weight.v1.raw`, `…doc.v1.raw`)."""
    return media_type.endswith(".raw")


def _read_raw(source: ImageSource, layer: Descriptor, origin: str) -> bytes:
    if layer.size_bytes > MAX_SMALL_BYTES:
        raise RegistryError(f"{origin} holds a {layer.title} of {layer.size_bytes} bytes, 4 MiB at most")
    return _read_whole(source, layer, origin)


def _read_whole(source: ImageSource, layer: Descriptor, origin: str) -> bytes:
    data = _read(source, layer, 0, layer.size_bytes)
    if sha256_digest(data) != layer.digest:
        raise RegistryError(f"{origin} is damaged: its bytes have another digest", hint="push it again")
    return data


def _walk_whole(source: ImageSource, layer: Descriptor, picker: _Picker) -> dict[str, bytes]:
    data = _read_whole(source, layer, picker.reader.origin)
    gunzip = Gunzip(layer.size_bytes, picker.reader.origin) if layer.media_type in GZIP_TYPES else None
    for piece in gunzip.feed(data) if gunzip else (data,):
        picker.follow(piece)
    return picker.files


def _walk_plain(source: ImageSource, layer: Descriptor, picker: _Picker) -> dict[str, bytes]:
    reader = picker.reader
    while reader.offset < layer.size_bytes - len(END) and not reader.ended:  # behind a shard comes only the end mark
        picker.follow(_read(source, layer, reader.offset, WINDOW_BYTES))
        if picker.unwanted_bytes:
            reader.skip()
    return picker.files


def _walk_gzip(source: ImageSource, layer: Descriptor, picker: _Picker) -> dict[str, bytes]:
    gunzip = Gunzip(layer.size_bytes, picker.reader.origin)
    with source.open_blob(layer.digest) as stream:
        for data in stream.pieces:
            for piece in gunzip.feed(data):
                picker.follow(piece)
            if picker.reader.ended or picker.unwanted_bytes > MAX_INFLATED_BYTES:  # a shard: nothing small behind it
                break
    return picker.files


def _read(source: ImageSource, layer: Descriptor, start: int, size_bytes: int) -> bytes:
    """Return a window of a layer, also from a registry that answers with more than it was asked for."""
    end = min(layer.size_bytes, start + size_bytes)
    with source.open_blob(layer.digest, start, end) as stream:
        window = b"".join(_between(stream.pieces, start - stream.offset, end - stream.offset))
    if len(window) != end - start:
        raise RegistryError(f"{source.name}: layer {layer.digest} is shorter than the image says")
    return window


def _between(pieces: Iterator[bytes], start: int, end: int) -> Iterator[bytes]:
    position = 0
    for piece in pieces:
        yield piece[max(0, start - position) : max(0, end - position)]
        position += len(piece)
        if position > end:  # at `end` itself the answer is over, and read to its end the connection serves again
            return


def _record(data: bytes | None, name: str) -> Record | None:
    if data is None:
        return None
    try:
        return Record.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(
            f"{name} holds a {RECORD_NAME} that is no valid record", hint="use the gemma-pack version that wrote it"
        ) from error
