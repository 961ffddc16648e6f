"""A modelcar image: the plan of its blobs, and the documents that hold them together.

A plan knows every layer and how large it is before a byte of weights is read. Whoever reads the layers, into a layout
or straight to a registry, learns their digests on the way and hands them to `ImagePlan.assemble`, which returns the
configs, manifests and the index. One manifest a platform; all share the weights.

Source: OCI image-spec, config.md, manifest.md, image-index.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from gemma_pack.errors import InvalidUsageError
from gemma_pack.oci.base import DEFAULT_BASE, BaseChoice, BaseImage, FileBlob, load_base
from gemma_pack.oci.labels import image_annotations, image_labels
from gemma_pack.oci.layers import LayerSource, plan_layers
from gemma_pack.oci.manifest import (
    CONFIG_TYPE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    Document,
    Index,
    Manifest,
    Platform,
    describe,
    encode_json,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.oci.layers import Layer

MAX_LAYERS: Final = 40
"""Docker stops at 127, older containerd at about 60 (overlay mount options must fit into one page)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A whole image. `documents` come before those that refer to them; the last one is the index, `root`."""

    root: Descriptor
    documents: tuple[Document, ...]
    layers: tuple[Descriptor, ...]
    """Of the checkpoint, in order."""
    base_layers: tuple[FileBlob, ...]
    """Of all platforms, each once."""

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Every blob, each once."""
        small = [document.descriptor for document in self.documents]
        blobs = [*(blob.descriptor for blob in self.base_layers), *self.layers, *small]
        return tuple({blob.digest: blob for blob in blobs}.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all blobs: what a registry stores, and what a layout holds."""
        return sum(blob.size_bytes for blob in self.blobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePlan:
    """An image before its layers are read."""

    layers: tuple[LayerSource, ...]
    bases: tuple[BaseImage, ...]
    """One a platform, in the order of the index."""
    annotations: Mapping[str, str]
    created: str

    @property
    def base_layers(self) -> tuple[FileBlob, ...]:
        """The layers of all bases, each once; their digests are known."""
        return tuple({blob.descriptor.digest: blob for base in self.bases for blob in base.layers}.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers, without the few kilobytes of documents."""
        return sum(layer.size_bytes for layer in self.layers) + sum(blob.size_bytes for blob in self.base_layers)

    def assemble(self, digests: Sequence[str]) -> Image:
        """Return the image, given the digest of each of `layers` in order."""
        layers = describe_layers(self.layers, digests)
        documents: list[Document] = []
        manifests: list[Descriptor] = []
        for base in self.bases:
            config = _document(self._config(base, digests), CONFIG_TYPE)
            manifest = Manifest(
                config=config.descriptor,
                layers=(*(blob.descriptor for blob in base.layers), *layers),
                annotations={**self.annotations, **_base_annotations(base)},
            )
            described = _document(manifest.encode(), MANIFEST_TYPE, platform=base.platform)
            documents += [config, described]
            manifests.append(described.descriptor)
        index = _document(Index(manifests=tuple(manifests), annotations=self.annotations).encode(), INDEX_TYPE)
        return Image(root=index.descriptor, documents=(*documents, index), layers=layers, base_layers=self.base_layers)

    def _config(self, base: BaseImage, digests: Sequence[str]) -> bytes:
        """Return the image's configuration for one platform.

        The base's own labels are left out: they would call this image by the base's name and version.
        """
        steps = [
            {"created": self.created, "created_by": f"gemma-pack package: {layer.title.removesuffix('.tar')}"}
            for layer in self.layers
        ]
        return encode_json({
            "created": self.created,
            **base.platform.to_json(),
            "config": {**(base.runtime or {}), "Labels": image_labels(self.annotations)},
            "rootfs": {"type": "layers", "diff_ids": [*base.diff_ids, *digests]},
            "history": [*base.history, *steps],
        })  # fmt: skip


def plan_image(checkpoint: Checkpoint, base: BaseChoice = DEFAULT_BASE) -> ImagePlan:
    """Plan the modelcar image of a checkpoint.

    Args:
        checkpoint: with its tokenizer; its record, where it has one, becomes labels and annotations.
        base: what lies under the weights.

    Raises:
        CheckpointError: the directory lacks a tokenizer, or holds what must not go into an image.
        InvalidUsageError: the base does not fit, or SOURCE_DATE_EPOCH is not a number.
        RegistryError: the layout of the base is broken.
    """
    checkpoint.require_tokenizer()
    bases = load_base(base)
    layers = plan_layers(checkpoint)
    most = max(len(one.layers) for one in bases) + len(layers)
    if most > MAX_LAYERS:
        raise InvalidUsageError(
            f"the image would have {most} layers, and {MAX_LAYERS} is what every runtime mounts",
            hint="choose a --base with fewer layers",
        )
    created = created_time()
    return ImagePlan(layers=layers, bases=bases, annotations=image_annotations(checkpoint, created), created=created)


def describe_layers(layers: Sequence[Layer], digests: Sequence[str]) -> tuple[Descriptor, ...]:
    """Return the descriptors of layers, given the digest of each."""
    return tuple(
        Descriptor(
            media_type=layer.media_type, digest=digest, size_bytes=layer.size_bytes, annotations=layer.annotations
        )
        for layer, digest in zip(layers, digests, strict=True)
    )


def created_time() -> str:
    """Return SOURCE_DATE_EPOCH (https://reproducible-builds.org/specs/source-date-epoch/) or 1970 as RFC 3339."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "0")
    try:
        return datetime.fromtimestamp(int(epoch), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidUsageError(
            f"SOURCE_DATE_EPOCH is {epoch!r}, not a number of seconds since 1970",
            hint='unset it, or set it to "$(git log -1 --format=%ct)"',
        ) from error


def _base_annotations(base: BaseImage) -> dict[str, str]:
    prefix = "org.opencontainers.image.base."
    named = {f"{prefix}name": base.name, f"{prefix}digest": base.digest}
    return {key: value for key, value in named.items() if value}


def _document(data: bytes, media_type: str, platform: Platform | None = None) -> Document:
    return Document(descriptor=describe(data, media_type, platform=platform), data=data)
