"""Packaging a checkpoint twice from one reading: as a modelcar for what mounts, as an artifact for what downloads.

They are two layouts, because no consumer of the one can use the other: a registry holds them under two tags.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.disk import refuse_existing, require_space
from gemma_pack.oci.artifact import plan_artifact
from gemma_pack.oci.base import DEFAULT_BASE, BaseChoice
from gemma_pack.oci.image import plan_image
from gemma_pack.oci.layout import create_layout
from gemma_pack.oci.package import (
    PackageResult,
    describe_package,
    package,
    refuse_inside,
    until,
    warn_for_ilab,
    write_base,
    write_documents,
)
from gemma_pack.oci.transfer import in_parallel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.oci.layers import LayerSource
    from gemma_pack.oci.layout import LayoutWriter


class PackagedPair(BaseModel):
    """A checkpoint in two layouts on disk."""

    model_config = ConfigDict(frozen=True)

    modelcar: PackageResult
    artifact: PackageResult


def package_pair(
    directory: Path,
    modelcar_target: Path,
    artifact_target: Path,
    *,
    base: BaseChoice = DEFAULT_BASE,
    replace: bool = False,
    reporter: Reporter,
) -> PackagedPair:
    """Write modelcar and artifact of the checkpoint in `directory`, each file being read once for both.

    Where one of the layouts is there already, it is compared with the checkpoint, and each is made on its own.

    Args:
        directory: a whole checkpoint with a tokenizer.
        modelcar_target: appears whole or not at all.
        artifact_target: the same.
        base: of the modelcar.
        replace: a layout of another image makes room for the one of these.
        reporter: hears of progress.

    Raises:
        As `package`.
    """
    if any((target / "oci-layout").is_file() for target in (modelcar_target, artifact_target)):
        return PackagedPair(
            modelcar=package(directory, modelcar_target, base=base, replace=replace, reporter=reporter),
            artifact=package(directory, artifact_target, kind="artifact", replace=replace, reporter=reporter),
        )
    for target in (modelcar_target, artifact_target):
        refuse_inside(target, directory)
        refuse_existing(target)
    checkpoint = Checkpoint.open(directory)
    image_plan, artifact_plan = plan_image(checkpoint, base), plan_artifact(checkpoint)
    require_space(modelcar_target, image_plan.size_bytes + artifact_plan.size_bytes)
    stop = threading.Event()
    with (
        create_layout(modelcar_target) as modelcar,
        create_layout(artifact_target) as artifact,
        reporter.progress(f"packaging {directory.name}", artifact_plan.size_bytes, "bytes") as task,
    ):
        write_base(image_plan, modelcar)
        jobs = [partial(_write_layer, layer, modelcar, artifact, stop, task.advance) for layer in image_plan.layers]
        written = in_parallel(jobs, stop)
        raw = {name: digest for _, digests in written for name, digest in digests.items()}
        image = image_plan.assemble([digest for digest, _ in written])
        files = artifact_plan.assemble([raw[layer.entry.name] for layer in artifact_plan.layers])
        write_documents(image, modelcar)
        write_documents(files, artifact)
    warn_for_ilab(files, reporter)
    return PackagedPair(
        modelcar=describe_package(image_plan, image, modelcar_target, base=base.spec, already_there=False),
        artifact=describe_package(artifact_plan, files, artifact_target, base=base.spec, already_there=False),
    )


def _write_layer(
    layer: LayerSource,
    modelcar: LayoutWriter,
    artifact: LayoutWriter,
    stop: threading.Event,
    advance: Callable[[int], None],
) -> tuple[str, dict[str, str]]:
    """Write a layer's tar, and each of its files as a blob, and return their digests, those of the files by name."""
    digests: dict[str, str] = {}
    with modelcar.open_blob() as tar:
        for part in layer.parts():
            if isinstance(part, bytes):
                tar.write(part)
                continue
            with artifact.open_blob() as raw:
                for chunk in until(stop, part.iter_chunks()):
                    tar.write(chunk)
                    raw.write(chunk)
                    advance(len(chunk))
            digests[part.name] = raw.digest
    return tar.digest, digests
