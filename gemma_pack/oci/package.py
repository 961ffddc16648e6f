"""Packaging: a checkpoint directory becomes an OCI layout that holds its modelcar image, or its artifact of raw files.

Each file is read once, two at a time, and hashed while it is written. What is there already is recognized
by its digest, blob by blob, so the same command twice writes nothing the second time.
"""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path  # noqa: TC003 - pydantic reads the annotation
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.digests import digest_files
from gemma_pack.disk import refuse_existing, require_space
from gemma_pack.errors import InvalidUsageError, RegistryError
from gemma_pack.oci.artifact import ArtifactPlan, plan_artifact
from gemma_pack.oci.base import DEFAULT_BASE, BaseChoice
from gemma_pack.oci.image import ImagePlan, plan_image
from gemma_pack.oci.layout import Layout, create_layout, hash_stream
from gemma_pack.oci.transfer import in_parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gemma_pack.console import Reporter
    from gemma_pack.oci.image import Image
    from gemma_pack.oci.layers import Layer
    from gemma_pack.oci.layout import LayoutWriter

    Plan = ImagePlan | ArtifactPlan
    Read = Callable[[Iterable[bytes], Callable[[int], None]], str]
    """Consumes a blob, reports each piece's size, returns its digest."""

Kind = Literal["modelcar", "artifact"]


class PackagedLayer(BaseModel):
    """One layer of the checkpoint."""

    model_config = ConfigDict(frozen=True)

    title: str
    digest: str
    size_bytes: int
    files: tuple[str, ...]


class PackageResult(BaseModel):
    """An image in a layout on disk."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    layout: Path
    digest: str
    """Of the modelcar's index or the artifact's manifest: what to pin."""
    size_bytes: int
    """Of all blobs, those of the base included."""
    platforms: tuple[str, ...]
    base: str | None
    """What was asked for. An artifact has no platforms and no base."""
    layers: tuple[PackagedLayer, ...]
    already_there: bool
    """The layout held this very image before."""


def package(
    directory: Path,
    target: Path,
    *,
    kind: Kind = "modelcar",
    base: BaseChoice = DEFAULT_BASE,
    replace: bool = False,
    reporter: Reporter,
) -> PackageResult:
    """Write the modelcar image, or the artifact, of the checkpoint in `directory` as the OCI layout `target`.

    Args:
        directory: a whole checkpoint with a tokenizer.
        target: appears whole or not at all.
        kind: `modelcar` for what mounts an image, `artifact` for what downloads files.
        base: what lies under the weights; of a modelcar only.
        replace: a layout of another image makes room for this one.
        reporter: hears of progress.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds what must not go into an image.
        InvalidUsageError: `target` is in the way or inside `directory`, the base does not fit, or an artifact is to
            have one.
        RegistryError: the base is broken.
        MachineError: the disk has no room.
    """
    refuse_inside(target, directory)
    checkpoint = Checkpoint.open(directory)
    if kind == "artifact" and not base.is_default:
        raise InvalidUsageError(
            "an artifact of raw files has no base and no platform", hint="leave out --base and --platform"
        )
    plan = plan_artifact(checkpoint) if kind == "artifact" else plan_image(checkpoint, base)
    is_layout = (target / "oci-layout").is_file()
    found = _recognize(plan, target, reporter) if is_layout else None
    if is_layout and found is None:
        _clear(target, replace=replace)
    image = found or _write(plan, target, reporter)
    if kind == "artifact":
        warn_for_ilab(image, reporter)
    return describe_package(plan, image, target, base=base.spec, already_there=found is not None)


def refuse_inside(target: Path, directory: Path) -> None:
    """Raise InvalidUsageError if `target` would lie in `directory`, which it is made from."""
    if target.resolve().is_relative_to(directory.resolve()):
        raise InvalidUsageError(
            f"{target} lies inside {directory}, and the next image would contain it",
            hint="choose another place with -o",
        )


def describe_package(plan: Plan, image: Image, target: Path, *, base: str, already_there: bool) -> PackageResult:
    """Return what is in the layout `target` now."""
    sources: Sequence[Layer] = plan.layers
    modelcar = plan if isinstance(plan, ImagePlan) else None
    return PackageResult(
        kind="modelcar" if modelcar else "artifact",
        layout=target,
        digest=image.root.digest,
        size_bytes=image.size_bytes,
        platforms=tuple(str(one.platform) for one in modelcar.bases) if modelcar else (),
        base=base if modelcar else None,
        layers=tuple(
            PackagedLayer(
                title=source.title,
                digest=layer.digest,
                size_bytes=layer.size_bytes,
                files=tuple(entry.name for entry in source.files),
            )
            for source, layer in zip(sources, image.layers, strict=True)
        ),
        already_there=already_there,
    )


def write_base(plan: Plan, writer: LayoutWriter) -> None:
    """Copy the layers of the base into a layout; raise RegistryError where one is damaged."""
    for blob in plan.base_layers:
        if writer.write_stream(blob.iter_chunks()) != blob.descriptor.digest:
            raise RegistryError(f"the base is damaged: {blob.path} has another digest", hint="fetch the base again")


def write_documents(image: Image, writer: LayoutWriter) -> None:
    """Write the documents of an image, all of whose layers are in the layout, and list it there."""
    for document in image.documents:
        writer.write_document(document.data)
    writer.add_image(image.root)


def warn_for_ilab(image: Image, reporter: Reporter) -> None:
    """Warn where ilab would lose files of an artifact: it keeps one name a blob, and makes no directories."""
    names: dict[str, list[str]] = {}
    for layer in image.layers:
        names.setdefault(layer.digest, []).append(layer.title or layer.digest)
    for twins in names.values():
        if len(twins) > 1:
            reporter.warn(
                f"{' and '.join(twins)} have the same bytes, and ilab model download will write only the last"
            )
    nested = [name for found in names.values() for name in found if "/" in name]
    if nested:
        reporter.warn(f"{nested[0]} lies in a directory, which ilab model download does not make")


def _write(plan: Plan, target: Path, reporter: Reporter) -> Image:
    refuse_existing(target)
    require_space(target, plan.size_bytes)
    with create_layout(target) as writer:
        write_base(plan, writer)
        image = plan.assemble(_read_layers(plan, writer.write_stream, f"packaging {target.name}", reporter))
        write_documents(image, writer)
    return image


def _clear(target: Path, *, replace: bool) -> None:
    """Remove the layout of another image; raise InvalidUsageError where it may not be replaced."""
    if not replace:
        raise InvalidUsageError(
            f"{target} holds another image, and it is in the way",
            hint="choose another place with -o, or remove it first",
        )
    shutil.rmtree(target)


def _recognize(plan: Plan, target: Path, reporter: Reporter) -> Image | None:
    """Return the planned image if the layout `target` holds exactly it, and None if it holds another one.

    Raises:
        InvalidUsageError: it holds this image, but damaged.
    """
    if not _may_hold(target, plan):
        return None
    image = plan.assemble(_read_layers(plan, hash_stream, f"comparing with {target.name}", reporter))
    layout = Layout.open(target)
    if layout.root.digest != image.root.digest:
        return None
    try:
        blobs = [layout.require_blob(descriptor) for descriptor in image.blobs]
    except RegistryError as error:
        raise _damaged(target, error.message) from error
    for found in digest_files(blobs, f"checking {target.name}", reporter):
        if found.sha256 != found.path:
            raise _damaged(target, f"the blob {found.path} has other bytes")
    return image


def _damaged(target: Path, what: str) -> InvalidUsageError:
    return InvalidUsageError(
        f"{target} holds this image, but damaged: {what}", hint="remove it, and run the command again"
    )


def _may_hold(target: Path, plan: Plan) -> bool:
    """Say whether the layers in `target` have the planned sizes, which costs no reading of weights."""
    planned = [layer.size_bytes for layer in plan.layers]
    try:
        manifests = Layout.open(target).manifests()
    except RegistryError:
        return False
    return all([layer.size_bytes for layer in manifest.layers][-len(planned) :] == planned for _, manifest in manifests)


def _read_layers(plan: Plan, read: Read, label: str, reporter: Reporter) -> list[str]:
    """Read every layer through `read`, several at a time, and return their digests in order."""
    stop = threading.Event()
    with reporter.progress(label, sum(layer.size_bytes for layer in plan.layers), "bytes") as task:
        jobs = [partial(read, until(stop, layer.iter_chunks()), task.advance) for layer in plan.layers]
        return in_parallel(jobs, stop)


def until(stop: threading.Event, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield `chunks` as long as nothing has asked to stop."""
    for chunk in chunks:
        if stop.is_set():
            return
        yield chunk
