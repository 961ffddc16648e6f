"""What a registry already has of an image that does not exist yet, and which of its limits the image would break.

The digests of quantized shards are not known before they are made, so they count as missing. The shards of untouched
tensors are: they follow from the base alone, so an image in the same repository that was made from the same base with
the same layers left alone holds the very same blobs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from gemma_pack.console import format_bytes
from gemma_pack.errors import GemmaPackError
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.describe import describe
from gemma_pack.oci.limits import broken_limits, limits_of
from gemma_pack.oci.manifest import Descriptor, Manifest
from gemma_pack.oci.reference import parse_reference
from gemma_pack.planning.findings import PlanFinding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gemma_pack.oci.describe import ImageDescription
    from gemma_pack.planning.sizes import Sizes
    from gemma_pack.record import Record
    from gemma_pack.sources.outline import Outline

MAX_SIBLINGS: Final = 16
"""Images of the repository that are looked at, the last tags by name first; each costs a few kilobytes."""
_SHARED: Final = ("tokenizer", "model-untouched-")
"""How the titles of layers begin that follow from the base alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """A layer of the image to be. `in_registry` is None where no registry was asked."""

    title: str
    size_bytes: int
    in_registry: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the registry said: the layers with what it has, bytes that it lacks, findings."""

    layers: tuple[PlannedLayer, ...]
    missing_bytes: int
    findings: tuple[PlanFinding, ...]


def ask_registry(
    push: str,
    found: Outline,
    sizes: Sizes,
    layers: Sequence[PlannedLayer],
    base_blobs: Mapping[str, int],
    *,
    plain_http: bool,
    ca_file: Path | None,
) -> Asked:
    """Ask the registry that `push` names.

    Raises:
        InvalidUsageError: `push` is no reference.
        RegistryError, AccessError, OfflineError: it does not answer as a registry.
    """
    reference = parse_reference(push)
    with RegistryClient(reference, plain_http=plain_http, ca_file=ca_file) as client:
        client.ping()
        base_there = {digest for digest in base_blobs if client.blob_size(digest) is not None}
        tags = sorted(client.tags(), reverse=True)[:MAX_SIBLINGS]
    shared: dict[tuple[str, int], str] = {}
    for tag in tags:
        named = parse_reference(f"{reference.host}/{reference.repository}:{tag}")
        try:
            sibling = describe(named, plain_http=plain_http, ca_file=ca_file)
        except GemmaPackError:  # no image, or none of ours
            continue
        for key in _same_layers(sibling, found, sizes):
            shared.setdefault(key, tag)
    known = tuple(replace(layer, in_registry=(layer.title, layer.size_bytes) in shared) for layer in layers)
    missing = sum(layer.size_bytes for layer in known if not layer.in_registry)
    missing += sum(size for digest, size in base_blobs.items() if digest not in base_there)
    total = sum(layer.size_bytes for layer in known) + sum(base_blobs.values())
    from_tags = sorted({shared[layer.title, layer.size_bytes] for layer in known if layer.in_registry})
    text = f"{reference.host} lacks {format_bytes(missing)} of {format_bytes(total)}"
    text += f"; the rest is there with {', '.join(from_tags)}" if from_tags else ""
    findings = [PlanFinding(subject="registry", state="ok", text=text), _limits(reference.host, known)]
    return Asked(layers=known, missing_bytes=missing, findings=tuple(findings))


def _same_layers(sibling: ImageDescription, found: Outline, sizes: Sizes) -> set[tuple[str, int]]:
    """Return title and size of the layers of `sibling` that the planned image will have too."""
    record = sibling.record
    if record is None or record.quantization is None or not _same_base(record, found):
        return set()
    same_choice = frozenset(record.quantization.untouched.changed) == sizes.changed
    prefixes = _SHARED if same_choice else _SHARED[:1]
    return {(str(one.title), one.size_bytes) for one in sibling.layers if str(one.title).startswith(prefixes)}


def _same_base(record: Record, found: Outline) -> bool:
    """Whether it was made from these very weights: by their digests, else by the commit of the same model."""
    digests = {file.path: file.sha256 for file in record.source.files if file.path.endswith(".safetensors")}
    if found.digests:
        return digests == dict(found.digests)
    return found.revision is not None and (record.source.model_id, record.source.revision) == (
        found.model_id,
        found.revision,
    )


def _limits(host: str, layers: Sequence[PlannedLayer]) -> PlanFinding:
    broken = broken_limits(host, {layer.title: layer.size_bytes for layer in layers}, _manifest_bytes(layers))
    if broken:
        remedy = "choose another registry; a layer is one shard, of at most 4 GB unless a single tensor has more"
        return PlanFinding(subject="limits", state="broken", text="; ".join(broken), remedy=remedy)
    limits = limits_of(host)
    largest = max(layer.size_bytes for layer in layers)
    text = f"{len(layers)} layers, the largest {format_bytes(largest)}"
    if limits.layer_bytes is None:
        return PlanFinding(subject="limits", state="ok", text=f"{text}; no limit of {host} is known")
    return PlanFinding(
        subject="limits", state="ok", text=f"{text}; {host} takes layers of {format_bytes(limits.layer_bytes)}"
    )


def _manifest_bytes(layers: Sequence[PlannedLayer]) -> int:
    """Return the size of a manifest of these layers: digests are all of one length."""
    digest = "sha256:" + "0" * 64
    described = tuple(
        Descriptor(
            media_type="application/vnd.oci.image.layer.v1.tar",
            digest=digest,
            size_bytes=layer.size_bytes,
            annotations={"org.opencontainers.image.title": layer.title, "olot.layer.content.name": layer.title},
        )
        for layer in layers
    )
    config = Descriptor(media_type="application/vnd.oci.image.config.v1+json", digest=digest, size_bytes=4096)
    return len(Manifest(config=config, layers=described, annotations={}).encode())
