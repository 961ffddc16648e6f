"""What registries refuse: layers that are too large, manifests that are too large, too many layers.

By host, as far as it is published or reported. Where a registry is not in the table, what holds for all of them is
what stands in the specification and in the runtimes that unpack an image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gemma_pack.console import format_bytes
from gemma_pack.oci.image import MAX_LAYERS

MAX_MANIFEST_BYTES: Final = 4 << 20
"""Registries should take manifests of 4 MiB (distribution-spec, "Pushing Manifests"); few take more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one registry takes. None where nothing is known."""

    layer_bytes: int | None = None
    source: str = ""
    """Who says so."""


_BY_HOST: Final[tuple[tuple[str, Limits], ...]] = (
    (r"ghcr\.io", Limits(layer_bytes=10_000_000_000, source="GitHub's documentation of its container registry")),
    (r"public\.ecr\.aws", Limits(layer_bytes=10_000 << 20, source="AWS's quotas of ECR Public")),
    (r".+\.dkr\.ecr\..+\.amazonaws\.com", Limits(layer_bytes=52_000 << 20, source="AWS's quotas of ECR")),
    (r"quay\.io", Limits(layer_bytes=20_000_000_000, source="oras-py, issue 137")),
    (r"swr\..+\.myhuaweicloud\.com", Limits(layer_bytes=10_000_000_000, source="Huawei's documentation of SWR")),
    (r"docker\.io", Limits(layer_bytes=10_000_000_000, source="cloudrift's emmy, issue 397: 23 GB hung, 10 GB passed")),
)


def limits_of(host: str) -> Limits:
    """Return what is known of the registry at `host`, which may have a port."""
    name = host.partition(":")[0].lower()
    return next((limits for pattern, limits in _BY_HOST if re.fullmatch(pattern, name)), Limits())


def broken_limits(host: str, layers: dict[str, int], manifest_bytes: int) -> list[str]:
    """Return a sentence for each limit that an image would break; `layers` are sizes in bytes by title."""
    limits = limits_of(host)
    found = [
        f"the layer {title} has {format_bytes(size)}, and {host} takes {format_bytes(limits.layer_bytes)} "
        f"({limits.source})"
        for title, size in layers.items()
        if limits.layer_bytes is not None and size > limits.layer_bytes
    ]
    if manifest_bytes > MAX_MANIFEST_BYTES:
        found.append(f"the manifest has {format_bytes(manifest_bytes)}, and registries take 4 MiB")
    if len(layers) > MAX_LAYERS:
        found.append(f"the image has {len(layers)} layers, and {MAX_LAYERS} is what every runtime mounts")
    return found
