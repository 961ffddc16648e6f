"""Packaging: a checkpoint directory becomes an OCI layout with its modelcar image.

Each file is read once, two at a time, and hashed while it is written. An image that is there already is recognized
by its digest, so the same command twice does nothing the second time.
"""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path  # noqa: TC003 - pydantic reads the annotation
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict

from gemma_pack.checkpoint import Checkpoint, refuse_existing
from gemma_pack.console import format_bytes
from gemma_pack.errors import InvalidUsageError, MachineError, RegistryError
from gemma_pack.oci.base import EMBEDDED
from gemma_pack.oci.image import Image, ImagePlan, plan_image
from gemma_pack.oci.layout import Layout, create_layout, hash_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gemma_pack.console import Reporter
    from gemma_pack.oci.manifest import Platform

    Read = Callable[[Iterable[bytes], Callable[[int], None]], str]
    """Consumes a blob, reports each piece's size, returns its digest."""

THREADS: Final = 2
"""sha256 runs at about 1.8 GB/s a core: two threads hash faster than most disks read and write."""


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

    layout: Path
    digest: str
    """Of the image index: what to pin."""
    size_bytes: int
    """Of all blobs, those of the base included."""
    platforms: tuple[str, ...]
    base: str
    layers: tuple[PackagedLayer, ...]
    already_there: bool
    """The layout held this very image before."""


def package(
    directory: Path,
    target: Path,
    *,
    base: str = EMBEDDED,
    platforms: Sequence[Platform] = (),
    reporter: Reporter,
) -> PackageResult:
    """Write the modelcar image of the checkpoint in `directory` as the OCI layout `target`.

    Args:
        directory: a whole checkpoint with a tokenizer.
        target: appears whole or not at all.
        base: `embedded`, `none` or the path of an OCI layout.
        platforms: empty for all that the base has.
        reporter: hears of progress.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds what must not go into an image.
        InvalidUsageError: `target` is in the way or inside `directory`, or the base does not fit.
        RegistryError: the base is broken.
        MachineError: the disk has no room.
    """
    if target.resolve().is_relative_to(directory.resolve()):
        raise InvalidUsageError(
            f"{target} lies inside {directory}, and the next image would contain it",
            hint="choose another place with -o",
        )
    plan = plan_image(Checkpoint.open(directory), base, platforms)
    already_there = _is_layout(target)
    image = _recognize(plan, target, reporter) if already_there else _write(plan, target, reporter)
    return PackageResult(
        layout=target,
        digest=image.root.digest,
        size_bytes=image.size_bytes,
        platforms=tuple(str(one.platform) for one in plan.bases),
        base=base,
        layers=tuple(
            PackagedLayer(
                title=source.title,
                digest=layer.digest,
                size_bytes=layer.size_bytes,
                files=tuple(entry.name for entry in source.files),
            )
            for source, layer in zip(plan.layers, image.layers, strict=True)
        ),
        already_there=already_there,
    )


def _write(plan: ImagePlan, target: Path, reporter: Reporter) -> Image:
    refuse_existing(target)
    _require_space(plan, target)
    with create_layout(target) as writer:
        for blob in plan.base_layers:
            if writer.write_stream(blob.iter_chunks()) != blob.descriptor.digest:
                raise RegistryError(f"the base is damaged: {blob.path} has another digest", hint="fetch the base again")
        image = plan.assemble(_read_layers(plan, writer.write_stream, f"packaging {target.name}", reporter))
        for document in image.documents:
            writer.write_document(document.data)
        writer.add_image(image.root)
    return image


def _recognize(plan: ImagePlan, target: Path, reporter: Reporter) -> Image:
    """Return the planned image if `target` holds exactly it; raise InvalidUsageError if it holds anything else."""
    in_the_way = InvalidUsageError(
        f"{target} holds another image, and it is in the way", hint="choose another place with -o, or remove it first"
    )
    if not _may_hold(target, plan):
        raise in_the_way
    image = plan.assemble(_read_layers(plan, hash_stream, f"comparing with {target.name}", reporter))
    layout = Layout.open(target)
    if layout.root.digest != image.root.digest:
        raise in_the_way
    try:
        for descriptor in image.blobs:
            layout.require_blob(descriptor)
    except RegistryError as error:
        raise InvalidUsageError(
            f"{target} holds this image, but damaged: {error.message}", hint="remove it, and run the command again"
        ) from error
    return image


def _may_hold(target: Path, plan: ImagePlan) -> bool:
    """Say whether the layers in `target` have the planned sizes, which costs no reading of weights."""
    planned = [layer.size_bytes for layer in plan.layers]
    try:
        manifests = Layout.open(target).manifests()
    except RegistryError:
        return False
    return all([layer.size_bytes for layer in manifest.layers][-len(planned) :] == planned for _, manifest in manifests)


def _is_layout(target: Path) -> bool:
    return (target / "oci-layout").is_file()


def _require_space(plan: ImagePlan, target: Path) -> None:
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < plan.size_bytes:
        raise MachineError(
            f"the image needs {format_bytes(plan.size_bytes)}, {existing} has {format_bytes(free)} free",
            hint="free some space, or choose another place with -o",
        )


def _read_layers(plan: ImagePlan, read: Read, label: str, reporter: Reporter) -> list[str]:
    """Read every layer through `read`, THREADS at a time, and return their digests in order."""
    total = sum(layer.size_bytes for layer in plan.layers)
    stop, lock = threading.Event(), threading.Lock()
    with reporter.progress(label, total, "bytes") as task, ThreadPoolExecutor(THREADS) as pool:

        def advance(size_bytes: int) -> None:
            with lock:
                task.advance(size_bytes)

        futures = [pool.submit(read, _until(stop, layer.iter_chunks()), advance) for layer in plan.layers]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.set()  # what runs ends at its next piece, what waits never starts
            pool.shutdown(cancel_futures=True)
            raise


def _until(stop: threading.Event, chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        if stop.is_set():
            return
        yield chunk
