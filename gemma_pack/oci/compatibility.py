"""What an image is and for whom it works: the result of `gemma-pack inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from gemma_pack.oci.finding import Finding  # noqa: TC001 - pydantic reads the annotation
from gemma_pack.oci.inspection import Inspection, inspect
from gemma_pack.oci.lint import Judgement, judge, lint
from gemma_pack.oci.source import DEFAULT_PLATFORM

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.oci.manifest import Platform
    from gemma_pack.oci.reference import Reference
    from gemma_pack.oci.retry import Retry


class LayerLine(BaseModel):
    """One layer, as the manifest names it."""

    model_config = ConfigDict(frozen=True)

    title: str | None
    media_type: str
    digest: str
    size_bytes: int
    files: tuple[str, ...]
    """Below /models, as far as it was read."""


class Compatibility(BaseModel):
    """An image, what is in it and for whom it works."""

    model_config = ConfigDict(frozen=True)

    name: str
    """As it was given: a reference, or the path of a layout."""
    digest: str
    """Of the index or manifest that it names: what to pin."""
    pinned: str | None
    kind: Literal["modelcar", "artifact"]
    platforms: tuple[str, ...]
    size_bytes: int
    """Of configuration and layers for one platform."""
    annotations: dict[str, str]
    layers: tuple[LayerLine, ...]
    tensors: int
    weights_bytes: int
    """Of the tensors whose headers were read."""
    judgements: tuple[Judgement, ...]
    findings: tuple[Finding, ...]
    bytes_read: int
    """What looking at it has cost, without the manifests."""

    @property
    def works_for_nobody(self) -> bool:
        """Whether no consumer would get a working model, as far as it can be told."""
        return all(judgement.verdict == "fails" for judgement in self.judgements)


def check_compatibility(
    image: Path | Reference | str,
    *,
    platform: Platform = DEFAULT_PLATFORM,
    plain_http: bool = False,
    ca_file: Path | None = None,
    retry: Retry | None = None,
) -> Compatibility:
    """Look at an image and apply every rule to it.

    Raises:
        As `inspect`.
    """
    found = inspect(image, platform=platform, plain_http=plain_http, ca_file=ca_file, retry=retry)
    findings = lint(found)
    manifest = found.manifest
    tensors = [tensor for shard in found.shards.values() if isinstance(shard, tuple) for tensor in shard]
    return Compatibility(
        name=found.name,
        digest=found.root.digest,
        pinned=found.pinned,
        kind="modelcar" if found.is_runnable else "artifact",
        platforms=tuple(map(str, found.platforms)),
        size_bytes=sum(blob.size_bytes for blob in (manifest.config, *manifest.layers)),
        annotations=dict(manifest.annotations),
        layers=tuple(_line(found, number) for number in range(len(found.layers))),
        tensors=len(tensors),
        weights_bytes=sum(tensor.size_bytes for tensor in tensors),
        judgements=judge(findings),
        findings=findings,
        bytes_read=found.bytes_read,
    )


def _line(found: Inspection, number: int) -> LayerLine:
    layer = found.layers[number].descriptor
    return LayerLine(
        title=layer.title,
        media_type=layer.media_type,
        digest=layer.digest,
        size_bytes=layer.size_bytes,
        files=tuple(sorted(path for path, file in found.files.items() if file.layer == layer)),
    )
