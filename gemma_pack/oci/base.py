"""What lies under the weights in an image: a base that can answer the commands of its consumers.

KServe's modelcar mode runs the image as a sidecar, so it needs a shell or, like the embedded base, an entry point that
knows what is wanted. Its native and fetch modes only read files, and `none` is enough for them.

    embedded   KServe's link-and-wait binary (github.com/opendatahub-io/modelcar-base-image), from the package
               modelcar-base-image: 1.3 MB, amd64 and arm64, no network, no shell
    none       nothing
    LAYOUT     any image in an OCI layout, such as `skopeo copy --all docker://ubi9-micro… oci:LAYOUT` leaves
    REF        any image in a registry, such as registry.access.redhat.com/ubi9/ubi-micro:9.8, which has a shell
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.errors import InvalidUsageError, RegistryError
from gemma_pack.oci.base_registry import keep_base, names_registry
from gemma_pack.oci.layers import read_file
from gemma_pack.oci.layout import Layout
from gemma_pack.oci.manifest import (
    GZIP_LAYER_TYPE,
    LAYER_TYPE,
    Descriptor,
    Manifest,
    Platform,
    parse_json,
    parse_platform,
)
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.source import IMAGE_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

EMBEDDED: Final = "embedded"
NONE: Final = "none"
DEFAULT_PLATFORMS: Final = (Platform("linux", "amd64"), Platform("linux", "arm64"))

_LAYER_TYPES: Final = {
    LAYER_TYPE: LAYER_TYPE,
    GZIP_LAYER_TYPE: GZIP_LAYER_TYPE,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": GZIP_LAYER_TYPE,
}
"""What KServe's three modes can all unpack, and its OCI name. Its fetch mode knows no zstd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileBlob:
    """A blob that lies in a file already, such as a layer of a base image."""

    descriptor: Descriptor
    path: Path

    @property
    def size_bytes(self) -> int:
        """Bytes of the blob."""
        return self.descriptor.size_bytes

    def iter_chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the blob's bytes from offset `start` on, in pieces of at most 1 MiB."""
        return read_file(self.path, self.size_bytes, start)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImage:
    """The base for one platform."""

    platform: Platform
    layers: tuple[FileBlob, ...] = ()
    diff_ids: tuple[str, ...] = ()
    runtime: Mapping[str, Any] | None = None
    """The `config` object of the image's configuration: entry point, environment, user."""
    history: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    digest: str | None = None
    """Of the base's own manifest for this platform."""


@dataclass(frozen=True, slots=True)
class BaseChoice:
    """Which base an image shall have."""

    spec: str = EMBEDDED
    """`embedded`, `none`, the path of an OCI layout, or a reference that begins with its registry's host."""
    platforms: tuple[Platform, ...] = ()
    """In the order that the image's index shall have; empty for all that the base has."""
    plain_http: bool = False
    """Speak HTTP without TLS to the base's registry where it is not on this machine."""
    ca_file: Path | None = None
    """Certificates to trust besides the system's."""

    @property
    def is_default(self) -> bool:
        """Whether nothing else than the embedded base was asked for."""
        return self.spec == EMBEDDED and not self.platforms


DEFAULT_BASE: Final = BaseChoice()


def load_base(choice: BaseChoice) -> tuple[BaseImage, ...]:
    """Return the base for each platform asked for, or for all that the base has.

    Raises:
        InvalidUsageError: the base lacks a platform, or has layers that some consumer cannot unpack.
        RegistryError: the layout is broken, or the registry has no such image.
        AccessError, OfflineError: the registry wants a login, or cannot be reached.
    """
    spec, platforms = choice.spec, choice.platforms
    if spec == NONE:
        return tuple(BaseImage(platform=platform) for platform in platforms or DEFAULT_PLATFORMS)
    if spec == EMBEDDED:
        directory, name = _embedded()
    elif (Path(spec) / "oci-layout").is_file():
        directory, name = Path(spec), None
    elif names_registry(spec):
        directory, name = keep_base(choice.spec, platforms, plain_http=choice.plain_http, ca_file=choice.ca_file), None
    else:
        raise InvalidUsageError(
            f"{spec} is no OCI layout",
            hint="--base takes embedded, none, the directory of an OCI layout, or host/name:tag of an image",
        )
    layout = Layout.open(directory)
    name = name or layout.root.annotations.get(IMAGE_NAME)
    available = [_read(layout, descriptor, manifest, name) for descriptor, manifest in _images(layout)]
    if not platforms:
        return tuple(available)
    return tuple(_pick(available, platform, spec) for platform in platforms)


def require_base(choice: BaseChoice) -> None:
    """Check a base before hours are spent on what lies upon it; one in a registry is fetched later, when it is needed.

    Raises:
        InvalidUsageError: there is no such base, it lacks a platform, or its reference is misspelt.
        RegistryError: the layout is broken.
    """
    if names_registry(choice.spec) and not (Path(choice.spec) / "oci-layout").is_file():
        parse_reference(choice.spec)
    else:
        load_base(choice)


def _embedded() -> tuple[Path, str]:
    import modelcar_base_image
    from modelcar_base_image.constants import EMBEDDED_OCI_LAYOUT_DIR, ODH_MODELCAR_BASE_IMAGE

    return Path(modelcar_base_image.__file__).parent / EMBEDDED_OCI_LAYOUT_DIR, ODH_MODELCAR_BASE_IMAGE


def _images(layout: Layout) -> list[tuple[Descriptor, Manifest]]:
    """Return the layout's images, without the attestations that BuildKit lists beside them for `unknown/unknown`."""
    return [(d, m) for d, m in layout.manifests() if d.platform is None or d.platform.os != "unknown"]


def _read(layout: Layout, descriptor: Descriptor, manifest: Manifest, name: str | None) -> BaseImage:
    """Return the base that a manifest describes, its platform read from the config, which always has it."""
    origin = f"{layout.directory}: {manifest.config.digest}"
    config = parse_json(layout.read_blob(manifest.config), origin=origin)
    try:
        diff_ids = tuple(map(str, config["rootfs"]["diff_ids"]))
        runtime, history = dict(config.get("config") or {}), tuple(map(dict, config.get("history") or ()))
    except (KeyError, TypeError, ValueError) as error:
        raise RegistryError(f"{origin} is no configuration of an image", hint="use another --base") from error
    if len(diff_ids) != len(manifest.layers):
        raise RegistryError(f"{origin} has {len(diff_ids)} diff_ids for {len(manifest.layers)} layers")
    return BaseImage(
        platform=parse_platform(config, origin=origin),
        layers=tuple(FileBlob(descriptor=_layer(d), path=layout.require_blob(d)) for d in manifest.layers),
        diff_ids=diff_ids,
        runtime=runtime,
        history=history,
        name=name,
        digest=descriptor.digest,
    )


def _layer(layer: Descriptor) -> Descriptor:
    media_type = _LAYER_TYPES.get(layer.media_type)
    if media_type is None:
        raise InvalidUsageError(
            f"the base has a layer of type {layer.media_type}, which KServe's fetch mode cannot unpack",
            hint="skopeo copy --dest-compress-format gzip makes a base with gzip layers",
        )
    return Descriptor(media_type=media_type, digest=layer.digest, size_bytes=layer.size_bytes)


def _pick(available: Sequence[BaseImage], platform: Platform, spec: str) -> BaseImage:
    """Return the base for `platform`; one asked for without its variant is satisfied by any."""
    for base in available:
        if base.platform in (platform, Platform(platform.os, platform.architecture, base.platform.variant)) and (
            platform.variant in (None, base.platform.variant)
        ):
            return base
    has = ", ".join(str(base.platform) for base in available)
    raise InvalidUsageError(
        f"the base {spec} has no {platform}, only {has}", hint="choose another --platform, or another --base"
    )
