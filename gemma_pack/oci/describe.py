"""What an image holds, without its weights: its digest, its layers, and the record and config of its checkpoint.

A tar header says how long a file is, so the walk through a layer goes from header to header and asks the registry for
little more than those: a layer with one 5 GB shard costs one small request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from gemma_pack.checkpoint import RECORD_NAME
from gemma_pack.errors import CheckpointError, RegistryError
from gemma_pack.oci.extraction import is_raw, require_known
from gemma_pack.oci.layer_reader import MAX_SMALL_BYTES, BlobReader, read_tar_layer
from gemma_pack.oci.manifest import parse_json
from gemma_pack.oci.source import RegistrySource, open_source, resolve
from gemma_pack.oci.tar_reader import place
from gemma_pack.record import Record

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from gemma_pack.oci.layer_reader import Part
    from gemma_pack.oci.manifest import Descriptor, Manifest, Platform
    from gemma_pack.oci.reference import Reference
    from gemma_pack.oci.retry import Retry
    from gemma_pack.oci.source import ImageSource
    from gemma_pack.oci.tar_reader import Member

CONFIG_NAME: Final = "config.json"
TOKENIZER_CONFIG_NAME: Final = "tokenizer_config.json"
CHAT_TEMPLATE_NAMES: Final = ("chat_template.jinja", "chat_template.json")
"""Files that hold a chat template alone; older checkpoints have it in TOKENIZER_CONFIG_NAME."""


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
    has_chat_template: bool
    """Whether a server that loads it answers turns, and not only continues text."""

    @property
    def is_artifact(self) -> bool:
        """Whether its layers are raw files, for ilab and ModelPack, and not the tars of a modelcar."""
        return all(is_raw(layer.media_type) for layer in self.layers)


def describe(
    image: Path | Reference | str,
    *,
    platform: Platform | None = None,
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
        wanted = (CONFIG_NAME, RECORD_NAME, TOKENIZER_CONFIG_NAME, *CHAT_TEMPLATE_NAMES)
        files = read_small_files(source, resolved.manifest, wanted)
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
        has_chat_template=_has_chat_template(files, source.name),
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
    reader = BlobReader(source)
    files: dict[str, bytes] = {}
    for layer in titled or manifest.layers:
        title = f"{source.name}: layer {layer.digest}"
        if is_raw(layer.media_type):
            if layer.title in names:
                files[str(layer.title)] = _read_raw(reader, layer, title)
            continue
        require_known(layer, title)
        files |= _read_tar(reader, layer, title, names)
    return files


def _read_tar(reader: BlobReader, layer: Descriptor, origin: str, names: Collection[str]) -> dict[str, bytes]:
    paths: dict[str, str] = {}

    def wanted(member: Member) -> Part | None:
        paths[member.name] = str(place(member.name, origin))
        return "whole" if paths[member.name] in names else None

    contents = read_tar_layer(reader, layer, wanted, whole_bytes=MAX_SMALL_BYTES)
    return {paths[name]: data for name, data in contents.files.items()}


def _read_raw(reader: BlobReader, layer: Descriptor, origin: str) -> bytes:
    if layer.size_bytes > MAX_SMALL_BYTES:
        raise RegistryError(f"{origin} holds a {layer.title} of {layer.size_bytes} bytes, 4 MiB at most")
    return reader.whole(layer, origin)


def _has_chat_template(files: Mapping[str, bytes], name: str) -> bool:
    if any(template in files for template in CHAT_TEMPLATE_NAMES):
        return True
    config = files.get(TOKENIZER_CONFIG_NAME, b"{}")
    return bool(parse_json(config, origin=f"{name}: {TOKENIZER_CONFIG_NAME}").get("chat_template"))


def _record(data: bytes | None, name: str) -> Record | None:
    if data is None:
        return None
    try:
        return Record.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(
            f"{name} holds a {RECORD_NAME} that is no valid record", hint="use the gemma-pack version that wrote it"
        ) from error
