"""Looking at an image without fetching it: manifest, configuration, tar headers, small files, safetensors headers.

All of it by Range, so an image of any size costs what its headers cost. What is found is kept as it is written;
what it means for whoever consumes the image is for `lint` to say. Only a base that should have a shell is read
through, because there is no other way to find one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal

from gemma_pack.checkpoint import INDEX_NAME
from gemma_pack.errors import CheckpointError, RegistryError
from gemma_pack.oci.extraction import GZIP_TYPES, PLAIN_TYPES, is_raw
from gemma_pack.oci.layer_reader import (
    MAX_SMALL_BYTES,
    MAX_WINDOW_BYTES,
    WINDOW_BYTES,
    BlobReader,
    bounded_header_bytes,
    read_tar_layer,
)
from gemma_pack.oci.layers import MODELS_DIRECTORY
from gemma_pack.oci.manifest import IMAGE_CONFIG_TYPES, parse_json
from gemma_pack.oci.source import DEFAULT_PLATFORM, RegistrySource, open_source, resolve
from gemma_pack.safetensors_file import LENGTH_BYTES, TensorInfo, parse_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from gemma_pack.oci.layer_reader import Part
    from gemma_pack.oci.manifest import Descriptor, Manifest, Platform
    from gemma_pack.oci.reference import Reference
    from gemma_pack.oci.retry import Retry
    from gemma_pack.oci.source import Resolved
    from gemma_pack.oci.tar_reader import Member

LINK_AND_WAIT: Final = "link-model-and-wait"
"""The program of opendatahub-io/modelcar-base-image, which does itself what KServe's `sh -c …` asks for."""
CHAT_TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_SMALL: Final = frozenset({"config.json", INDEX_NAME})
_WHOLE_BYTES: Final = 32 << 10
"""A layer up to this size is read whole, and so checked against its digest."""

Reading = Literal["whole", "begin", "not", "base"]
"""How far a layer was read: to its end; up to a shard that cannot be skipped; not at all, for it cannot be read here;
not at all, for it lies under the layers of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedLayer:
    """One layer and the members of its tar, in order, named as they are written. A raw file has none."""

    descriptor: Descriptor
    reading: Reading
    members: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedFile:
    """A file below /models, or of an artifact, as the last layer that has it says."""

    path: str
    size_bytes: int
    layer: Descriptor
    member: Member | None
    """None for a raw file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """All that was found."""

    name: str
    root: Descriptor
    pinned: str | None
    """`host/name@digest`; None for a layout."""
    platforms: tuple[Platform, ...]
    manifest: Manifest
    configuration: Mapping[str, Any]
    """The blob that the manifest names as its config."""
    layers: tuple[InspectedLayer, ...]
    files: Mapping[str, InspectedFile] = field(repr=False)
    """By path below /models."""
    contents: Mapping[str, bytes] = field(repr=False)
    """Of the small files that were read."""
    shards: Mapping[str, tuple[TensorInfo, ...] | CheckpointError] = field(repr=False)
    """The tensors of each safetensors file whose header was reached, or what is wrong with it."""
    programs: frozenset[str] | None = field(repr=False)
    """Paths of what can be run in the image, as far as it was read; None where nobody looked."""
    bytes_read: int

    @property
    def is_runnable(self) -> bool:
        """Whether it is an image of a container, whatever its layers are."""
        return self.manifest.config.media_type in IMAGE_CONFIG_TYPES

    @property
    def is_read(self) -> bool:
        """Whether all layers were read, so that what was not found is not there."""
        return all(layer.reading in {"whole", "base"} for layer in self.layers)

    @property
    def runtime(self) -> Mapping[str, Any]:
        """How the image runs: the `config` object of its configuration."""
        found = self.configuration.get("config")
        return found if isinstance(found, dict) else {}


def inspect(
    image: Path | Reference | str,
    *,
    platform: Platform = DEFAULT_PLATFORM,
    plain_http: bool = False,
    ca_file: Path | None = None,
    retry: Retry | None = None,
) -> Inspection:
    """Look at the image that a reference or the path of an OCI layout names.

    Raises:
        InvalidUsageError: `image` is neither, or is not for `platform`.
        RegistryError: there is no such image, or it is damaged.
        AccessError: the registry wants a login, or another one.
        OfflineError: the registry cannot be reached.
    """
    with open_source(image, plain_http=plain_http, ca_file=ca_file, retry=retry) as source:
        resolved = resolve(source, platform)
        pinned = str(source.reference.pinned(resolved.root.digest)) if isinstance(source, RegistrySource) else None
        return _Inspector(BlobReader(source), resolved, pinned).inspect()


def model_path(name: str) -> str | None:
    """Return where a container runtime puts a member below /models; None for what lies elsewhere."""
    parts = [part for part in name.split("/") if part not in {"", "."}]
    return "/".join(parts[1:]) if parts[:1] == [MODELS_DIRECTORY] and ".." not in parts else None


class _Inspector:
    def __init__(self, reader: BlobReader, resolved: Resolved, pinned: str | None) -> None:
        self.reader = reader
        self.resolved = resolved
        self.manifest = resolved.manifest
        self.pinned = pinned
        self.contents: dict[str, bytes] = {}

    def inspect(self) -> Inspection:
        config = self.manifest.config
        if config.size_bytes > MAX_SMALL_BYTES:
            raise RegistryError(f"{self.reader.source.name}: the configuration has {config.size_bytes} bytes")
        data = self.reader.whole(config, f"{self.reader.source.name}: configuration {config.digest}")
        configuration = parse_json(data or b"{}", origin=f"{self.reader.source.name}: {config.digest}")
        runnable = config.media_type in IMAGE_CONFIG_TYPES
        wants_shell = runnable and not _links_and_waits(configuration)
        layers = tuple(self._layer(layer, wants_shell=wants_shell) for layer in self.manifest.layers)
        files = _files(layers)
        self._read_chat_template(files)
        shards = {
            path: self._tensors(path, file)
            for path, file in sorted(files.items())
            if path.endswith(".safetensors") and path in self.contents
        }
        return Inspection(
            name=self.reader.source.name,
            root=self.resolved.root,
            pinned=self.pinned,
            platforms=self.resolved.platforms,
            manifest=self.manifest,
            configuration=configuration,
            layers=layers,
            files=files,
            contents={path: data for path, data in self.contents.items() if path in files and path not in shards},
            shards=shards,
            programs=_programs(layers) if wants_shell else None,
            bytes_read=self.reader.bytes_read,
        )

    def _layer(self, layer: Descriptor, *, wants_shell: bool) -> InspectedLayer:
        if is_raw(layer.media_type):
            self._read_raw(layer)
            return InspectedLayer(descriptor=layer, reading="whole")
        if layer.media_type not in PLAIN_TYPES | GZIP_TYPES:
            return InspectedLayer(descriptor=layer, reading="not")
        is_base = not layer.title and any(one.title for one in self.manifest.layers)
        if is_base and not wants_shell:
            return InspectedLayer(descriptor=layer, reading="base")
        window_bytes = MAX_WINDOW_BYTES if is_base else WINDOW_BYTES
        found = read_tar_layer(self.reader, layer, _part, whole_bytes=_WHOLE_BYTES, window_bytes=window_bytes)
        self.contents |= {str(model_path(name)): data for name, data in found.files.items()}
        return InspectedLayer(descriptor=layer, reading="whole" if found.complete else "begin", members=found.members)

    def _read_raw(self, layer: Descriptor) -> None:
        path = layer.title or ""
        if path.endswith(".safetensors"):
            head = self.reader.part(layer, 0, WINDOW_BYTES)
            needed = len(head)
            if needed >= LENGTH_BYTES:
                needed = bounded_header_bytes(head, layer.size_bytes, f"{self.reader.source.name}: {path}")
            head += self.reader.part(layer, len(head), needed - len(head)) if needed > len(head) else b""
            self.contents[path] = head[:needed]
        elif path in _SMALL:
            self.contents[path] = self._small(layer)

    def _small(self, layer: Descriptor) -> bytes:
        if layer.size_bytes > MAX_SMALL_BYTES:
            raise RegistryError(f"{self.reader.source.name} holds a {layer.title} of {layer.size_bytes} bytes")
        return self.reader.whole(layer, f"{self.reader.source.name}: {layer.title}")

    def _read_chat_template(self, files: Mapping[str, InspectedFile]) -> None:
        """Read tokenizer_config.json where a template is nowhere else: of a Gemma 3 it has a megabyte."""
        holder = files.get(TOKENIZER_CONFIG)
        if holder is None or any(name in files for name in CHAT_TEMPLATES) or holder.size_bytes > MAX_SMALL_BYTES:
            return
        if holder.member is None:
            self.contents[TOKENIZER_CONFIG] = self._small(holder.layer)
        elif holder.layer.media_type in PLAIN_TYPES:
            data = self.reader.part(holder.layer, holder.member.offset, holder.size_bytes)
            self.contents[TOKENIZER_CONFIG] = data
        else:
            found = read_tar_layer(
                self.reader, holder.layer, lambda member: "whole" if member == holder.member else None, whole_bytes=0
            )
            for data in found.files.values():
                self.contents[TOKENIZER_CONFIG] = data

    def _tensors(self, path: str, file: InspectedFile) -> tuple[TensorInfo, ...] | CheckpointError:
        try:
            return tuple(parse_header(Path(path), self.contents[path], file.size_bytes))
        except CheckpointError as error:
            return error


def _part(member: Member) -> Part | None:
    path = model_path(member.name)
    if path is not None and path.endswith(".safetensors"):
        return "header"
    return "whole" if path in _SMALL else None


def _links_and_waits(configuration: Mapping[str, Any]) -> bool:
    runtime = configuration.get("config")
    entry_point = runtime.get("Entrypoint") if isinstance(runtime, dict) else None
    return isinstance(entry_point, list) and [PurePosixPath(str(one)).name for one in entry_point] == [LINK_AND_WAIT]


def _laid_over(layers: Iterable[InspectedLayer]) -> Iterator[tuple[str, InspectedLayer, Member]]:
    """Yield what is left when the tars lie over one another, by normal path (OCI image-spec, layer.md, "Whiteouts")."""
    found: dict[str, tuple[InspectedLayer, Member]] = {}
    for layer in layers:
        names = [("/".join(part for part in m.name.split("/") if part not in {"", "."}), m) for m in layer.members]
        for name, _ in names:
            folder, slash, last = name.rpartition("/")
            if last == ".wh..wh..opq":
                found = {path: one for path, one in found.items() if not path.startswith(folder + slash)}
            elif last.startswith(".wh."):
                gone = folder + slash + last.removeprefix(".wh.")
                found = {path: one for path, one in found.items() if not f"{path}/".startswith(f"{gone}/")}
        found |= {name: (layer, member) for name, member in names if ".wh." not in name}
    for path, (layer, member) in found.items():
        yield path, layer, member


def _files(layers: tuple[InspectedLayer, ...]) -> dict[str, InspectedFile]:
    files = {
        layer.descriptor.title: InspectedFile(
            path=layer.descriptor.title,
            size_bytes=layer.descriptor.size_bytes,
            layer=layer.descriptor,
            member=None,
        )
        for layer in layers
        if is_raw(layer.descriptor.media_type) and layer.descriptor.title
    }
    for name, layer, member in _laid_over(layers):
        path = model_path(name)
        if path and member.kind == "file":
            files[path] = InspectedFile(path=path, size_bytes=member.size_bytes, layer=layer.descriptor, member=member)
    return files


def _programs(layers: tuple[InspectedLayer, ...]) -> frozenset[str]:
    """Return what may be run: files with an x, and links, which are trusted to lead to one."""
    return frozenset(
        path
        for path, _, member in _laid_over(layers)
        if (member.kind == "file" and member.mode & 0o111) or member.link is not None
    )
