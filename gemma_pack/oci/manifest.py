"""The JSON documents of an OCI image: descriptors, manifests and indexes.

They come from registries and from other people's layouts, so every field is checked on the way in and nothing
that is wrong gets past `parse`. On the way out the encoding is deterministic: the same image has the
same digest wherever it is built.

Source: https://github.com/opencontainers/image-spec (descriptor.md, manifest.md, image-index.md, annotations.md).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Mapping

INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
IMAGE_CONFIG_TYPES: Final = frozenset({CONFIG_TYPE, "application/vnd.docker.container.image.v1+json"})
LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar"
GZIP_LAYER_TYPE: Final = LAYER_TYPE + "+gzip"
EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX_TYPE: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES: Final = frozenset({MANIFEST_TYPE, DOCKER_MANIFEST_TYPE})
INDEX_TYPES: Final = frozenset({INDEX_TYPE, DOCKER_INDEX_TYPE})

MAX_DOCUMENT_BYTES: Final = 4 << 20
"""The largest manifest that registries should accept (distribution-spec, "Pushing Manifests")."""

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on, in Go's names: `linux/arm64`, `linux/arm/v7`."""

    os: str
    architecture: str
    variant: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read `os/architecture[/variant]`; raise ValueError for anything else."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(re.fullmatch(r"[a-z0-9_.-]+", part) for part in parts):
            raise ValueError(f"{text!r} is not os/architecture, such as linux/amd64")
        return cls(*parts)

    def to_json(self) -> dict[str, str]:
        """Return the platform object of a descriptor."""
        entry = {"architecture": self.architecture, "os": self.os}
        return entry | ({"variant": self.variant} if self.variant else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """Names one blob by what it is, its digest (`sha256:` and 64 hex digits) and its size."""

    media_type: str
    digest: str
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str | None = None

    def __post_init__(self) -> None:
        """Refuse what could not name a blob: the digest becomes a file name and a part of a URL."""
        if not _DIGEST.fullmatch(self.digest):
            raise RegistryError(
                f"{self.digest!r} is not a sha256 digest", hint="only sha256 digests are supported, as registries write"
            )
        if self.size_bytes < 0:
            raise RegistryError(f"the descriptor of {self.digest} has a negative size")

    @property
    def hex(self) -> str:
        """The digest without its algorithm."""
        return self.digest.removeprefix("sha256:")

    @property
    def title(self) -> str | None:
        """The file name that the blob was given, from `org.opencontainers.image.title`."""
        return self.annotations.get("org.opencontainers.image.title")

    def to_json(self) -> dict[str, Any]:
        """Return the descriptor as the object of a manifest or index."""
        entry: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes}
        if self.annotations:
            entry["annotations"] = dict(sorted(self.annotations.items()))
        if self.artifact_type:
            entry["artifactType"] = self.artifact_type
        if self.platform:
            entry["platform"] = self.platform.to_json()
        return entry

    @classmethod
    def from_json(cls, value: Any, *, origin: str) -> Descriptor:  # noqa: ANN401 - parsed JSON
        """Check a parsed descriptor; `origin` names the document in errors.

        Raises:
            RegistryError: a field is missing or of the wrong kind.
        """
        entry = _object(value, origin, "a descriptor")
        size = entry.get("size")
        if type(size) is not int:
            raise RegistryError(f"{origin}: the size of a descriptor is {size!r}, not a number of bytes")
        platform = entry.get("platform")
        return cls(
            media_type=_text(entry, "mediaType", origin),
            digest=_text(entry, "digest", origin),
            size_bytes=size,
            annotations=_annotations(entry, origin),
            platform=None if platform is None else parse_platform(platform, origin=origin),
            artifact_type=_optional_text(entry, "artifactType", origin),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A small blob held in memory: a config, a manifest or an index."""

    descriptor: Descriptor
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One image for one platform, or one artifact: a config and layers."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str | None = None
    subject: Descriptor | None = None
    media_type: str = MANIFEST_TYPE

    def encode(self) -> bytes:
        """Return the manifest's bytes, the same for equal manifests."""
        document: dict[str, Any] = {"schemaVersion": 2, "mediaType": self.media_type}
        if self.artifact_type:
            document["artifactType"] = self.artifact_type
        document["config"] = self.config.to_json()
        document["layers"] = [layer.to_json() for layer in self.layers]
        if self.subject:
            document["subject"] = self.subject.to_json()
        if self.annotations:
            document["annotations"] = dict(sorted(self.annotations.items()))
        return encode_json(document)

    @classmethod
    def parse(cls, data: bytes, *, origin: str) -> Manifest:
        """Read and check a manifest; `origin` names it in errors.

        Raises:
            RegistryError: it is not a manifest of an OCI or Docker image.
        """
        document = parse_json(data, origin=origin)
        media_type = _optional_text(document, "mediaType", origin) or MANIFEST_TYPE
        if media_type not in MANIFEST_TYPES:
            raise RegistryError(f"{origin} is {media_type!r}, not an image manifest")
        layers = document.get("layers")
        if not isinstance(layers, list):
            raise RegistryError(f"{origin} has no list of layers")
        subject = document.get("subject")
        return cls(
            config=Descriptor.from_json(document.get("config"), origin=origin),
            layers=tuple(Descriptor.from_json(layer, origin=origin) for layer in layers),
            annotations=_annotations(document, origin),
            artifact_type=_optional_text(document, "artifactType", origin),
            subject=None if subject is None else Descriptor.from_json(subject, origin=origin),
            media_type=media_type,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """A list of manifests: an image for several platforms, the content of a layout, or referrers."""

    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    media_type: str = INDEX_TYPE

    def encode(self) -> bytes:
        """Return the index's bytes, the same for equal indexes."""
        document: dict[str, Any] = {"schemaVersion": 2, "mediaType": self.media_type}
        document["manifests"] = [manifest.to_json() for manifest in self.manifests]
        if self.annotations:
            document["annotations"] = dict(sorted(self.annotations.items()))
        return encode_json(document)

    @classmethod
    def parse(cls, data: bytes, *, origin: str) -> Index:
        """Read and check an index; `origin` names it in errors.

        Raises:
            RegistryError: it is not an index of OCI or Docker manifests.
        """
        document = parse_json(data, origin=origin)
        media_type = _optional_text(document, "mediaType", origin) or INDEX_TYPE
        if media_type not in INDEX_TYPES:
            raise RegistryError(f"{origin} is {media_type!r}, not an image index")
        manifests = document.get("manifests")
        if not isinstance(manifests, list):
            raise RegistryError(f"{origin} has no list of manifests")
        return cls(
            manifests=tuple(Descriptor.from_json(manifest, origin=origin) for manifest in manifests),
            annotations=_annotations(document, origin),
            media_type=media_type,
        )


def sha256_digest(data: bytes) -> str:
    """Return the digest of a blob held in memory: `sha256:` and 64 hex digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def describe(data: bytes, media_type: str, **fields: Any) -> Descriptor:  # noqa: ANN401 - Descriptor's own fields
    """Return the descriptor of a blob held in memory."""
    return Descriptor(media_type=media_type, digest=sha256_digest(data), size_bytes=len(data), **fields)


def encode_json(document: Any) -> bytes:  # noqa: ANN401 - what JSON can hold
    """Encode without spaces, keys in the order given, as UTF-8."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def parse_json(data: bytes, *, origin: str) -> dict[str, Any]:
    """Return the JSON object in `data`; raise RegistryError where it is none or larger than 4 MiB."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise RegistryError(f"{origin} has {len(data)} bytes; documents of an image have 4 MiB at most")
    try:
        value = json.loads(data)
        encode_json(value)  # refuses halves of surrogate pairs, which could not be shown or written again
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"{origin} is not JSON: {error}") from error
    return _object(value, origin, "the document")


def _object(value: Any, origin: str, what: str) -> dict[str, Any]:  # noqa: ANN401 - parsed JSON
    if not isinstance(value, dict):
        raise RegistryError(f"{origin}: {what} is not a JSON object")
    return value


def _text(entry: Mapping[str, Any], key: str, origin: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise RegistryError(f"{origin}: {key} is missing or not a text")
    return value


def _optional_text(entry: Mapping[str, Any], key: str, origin: str) -> str | None:
    return None if entry.get(key) in (None, "") else _text(entry, key, origin)


def _annotations(entry: Mapping[str, Any], origin: str) -> dict[str, str]:
    value = entry.get("annotations")
    annotations = {} if value is None else _object(value, origin, "annotations")
    if not all(isinstance(text, str) for text in annotations.values()):
        raise RegistryError(f"{origin}: an annotation is not a text")
    return annotations


def parse_platform(value: Any, *, origin: str) -> Platform:  # noqa: ANN401 - parsed JSON
    """Return the platform that a descriptor or an image's configuration names; raise RegistryError for a wrong one."""
    entry = _object(value, origin, "platform")
    return Platform(
        os=_text(entry, "os", origin),
        architecture=_text(entry, "architecture", origin),
        variant=_optional_text(entry, "variant", origin),
    )
