"""Pulling: the checkpoint in an image comes to lie in a directory, whole or not at all.

    .NAME.pull/           beside the directory, private: the layers, as `extraction` and `raw_files` describe them
    .NAME.pull/image-HEX/ the checkpoint put together from its layers, in order; it becomes NAME
    .NAME.pull/moved      from the first file that an image took out of a layer on: without that image no layer is whole
    .NAME.pulled.json     which image NAME came from, so that the same command twice does nothing the second time

Weights are written once, where they stay. After an interruption, `kill -9` or a power cut, the same command reads back
what is there and asks for the rest. The directory itself gets nothing that is not in the image.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.disk import is_ours, publish, refuse_existing, require_makeable, require_space, write_atomic
from gemma_pack.errors import CheckpointError, InvalidUsageError, RegistryError
from gemma_pack.oci.arrival import PUT_AGAIN
from gemma_pack.oci.extraction import LayerExtraction, is_raw, require_known
from gemma_pack.oci.raw_files import RawExtraction, place_raw, raw_paths
from gemma_pack.oci.retry import PROGRESS_BYTES, AnswerError, Retry
from gemma_pack.oci.source import DEFAULT_PLATFORM, Resolved, open_source, resolve
from gemma_pack.oci.transfer import in_parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gemma_pack.console import Reporter
    from gemma_pack.oci.arrival import Arrival
    from gemma_pack.oci.manifest import Descriptor, Platform
    from gemma_pack.oci.reference import Reference
    from gemma_pack.oci.source import ImageSource


_TRIES: Final = 2
"""Of a layer whose bytes arrive damaged."""
_MOVED: Final = "moved"


class _UnfitError(Exception):
    """The bytes of a layer cannot be its own, or hold what must not be unpacked."""

    def __init__(self, reason: RegistryError) -> None:
        super().__init__(reason.message)
        self.reason = reason


class PulledFile(BaseModel):
    """A file as it was written: enough to see whether it was touched since, without reading it."""

    model_config = ConfigDict(frozen=True)

    path: str
    size_bytes: int
    mtime_ns: int


class _Origin(BaseModel):
    """All of .NAME.pulled.json."""

    model_config = ConfigDict(frozen=True)

    digest: str
    files: tuple[PulledFile, ...]


class PullResult(BaseModel):
    """A checkpoint from an image, in a directory."""

    model_config = ConfigDict(frozen=True)

    directory: Path
    reference: str
    """As it was given: a reference, or the path of a layout."""
    digest: str
    """Of what the reference named then, an index or a manifest."""
    manifest_digest: str
    """Of the manifest for the platform."""
    files: int
    size_bytes: int
    """Of the files."""
    downloaded_bytes: int
    resumed_bytes: int
    """Read back from an earlier try instead."""
    seconds: float
    already_there: bool


def pull(
    image: Path | Reference | str,
    target: Path,
    *,
    platform: Platform = DEFAULT_PLATFORM,
    plain_http: bool = False,
    ca_file: Path | None = None,
    retry: Retry | None = None,
    reporter: Reporter,
) -> PullResult:
    """Bring the checkpoint of an image, or of an artifact of raw files, into the directory `target`.

    Args:
        image: a reference, or an OCI layout on disk.
        target: appears whole or not at all; where the same image was pulled before, it stays as it is.
        platform: whose manifest to read; the checkpoint is the same for all.
        plain_http: speak HTTP without TLS to a registry that is not on this machine.
        ca_file: certificates to trust besides the system's.
        retry: patience with the registry.
        reporter: hears of progress.

    Raises:
        InvalidUsageError: something else is at `target`, or the image is not for `platform`.
        RegistryError: there is no such image, it is damaged, or holds what must not be unpacked.
        CheckpointError: what the image holds is no whole checkpoint.
        MachineError: the disk has no room.
        AccessError: the registry wants a login, or another one.
        OfflineError: the registry cannot be reached.
    """
    begin_s = time.monotonic()
    target = Path(os.path.abspath(target))  # noqa: PTH100 - without following a link that may be in the way
    require_makeable(target)
    retry = (retry or Retry()).telling(reporter.status)
    with open_source(image, plain_http=plain_http, ca_file=ca_file, retry=retry) as source:
        resolved = resolve(source, platform)
        files = _present(target, resolved.descriptor.digest)
        already_there = files is not None
        downloaded = resumed = 0
        if files is None:
            refuse_existing(target)
            with _staging(target) as staging:
                downloaded, resumed = _fetch(source, resolved, staging, target, reporter)
                files = _put_together(source, resolved, staging, target)
    return PullResult(
        directory=target,
        reference=source.name,
        digest=resolved.root.digest,
        manifest_digest=resolved.descriptor.digest,
        files=len(files),
        size_bytes=sum(file.size_bytes for file in files),
        downloaded_bytes=downloaded,
        resumed_bytes=resumed,
        seconds=round(time.monotonic() - begin_s, 3),
        already_there=already_there,
    )


def _present(target: Path, digest: str) -> tuple[PulledFile, ...] | None:
    """Return the files of `target` if they came from the manifest `digest` and none was touched since."""
    path = _origin_path(target)
    try:
        origin = _Origin.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    if not is_ours(path):  # it would have us believe that somebody else's files are the image's
        return None
    same = origin.digest == digest and all(_is_untouched(target, file) for file in origin.files)
    return origin.files if same and target.is_dir() else None


def _is_untouched(target: Path, file: PulledFile) -> bool:
    try:
        found = (target / file.path).stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (file.size_bytes, file.mtime_ns)


def _origin_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.pulled.json")


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yield the private directory beside `target`, held against other pulls to the same place; it outlives errors."""
    staging = target.with_name(f".{target.name}.pull")
    staging.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_ours(staging):  # whole layers in it are taken on trust
        raise InvalidUsageError(
            f"{staging} is a link, or belongs to another user", hint="remove it, or choose another directory with -o"
        )
    with (staging / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidUsageError(
                f"another pull to {target} is under way", hint="wait for it, or choose another directory with -o"
            ) from error
        except OSError:  # a file system without locks, where nobody keeps another pull out
            pass
        yield staging
    with suppress(OSError):  # what `_remove` could not: NFS keeps the name of an open file until it is closed
        staging.rmdir()


def _fetch(source: ImageSource, resolved: Resolved, staging: Path, target: Path, reporter: Reporter) -> tuple[int, int]:
    """Bring every layer into `staging`, and return the bytes downloaded and those read back."""
    layers = list({layer.digest: layer for layer in resolved.manifest.layers}.values())
    titles = [f"{source.name}: layer {_printable(layer.title) or layer.digest}" for layer in layers]
    for layer, title in zip(layers, titles, strict=True):
        require_known(layer, title)
    raw_paths(resolved.manifest, source.name)
    _tidy(staging, resolved)
    extractions = [_extraction(staging, layer, title) for layer, title in zip(layers, titles, strict=True)]
    missing = [extraction for extraction in extractions if not extraction.done.is_dir()]
    missing.sort(key=lambda extraction: -extraction.layer.size_bytes)
    present = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    require_space(target, max(0, sum(layer.size_bytes for layer in layers) - present))
    total = sum(extraction.layer.size_bytes for extraction in missing)
    with reporter.progress(f"pulling to {target.name}", total, "bytes") as task:
        jobs = [partial(_fetch_layer, source, extraction, task.advance) for extraction in missing]
        moved = in_parallel(jobs, source.patience.stop)
    return sum(downloaded for downloaded, _ in moved), sum(resumed for _, resumed in moved)


def _tidy(staging: Path, resolved: Resolved) -> None:
    """Remove what belongs to another image, whose tag has moved since; keep the layers that both have."""
    image = _image_path(staging, resolved)
    wanted = {layer.hex for layer in resolved.manifest.layers}
    moved = staging / _MOVED
    spent = moved.exists() and not image.is_dir()  # by another image, or by one that has its name already
    for path in staging.iterdir():
        known = path.name.partition(".")[0] in wanted or path == image
        if path.is_dir() and (spent or not known):
            shutil.rmtree(path)
    if spent:
        moved.unlink()


def _extraction(staging: Path, layer: Descriptor, title: str) -> Arrival:
    return (RawExtraction if is_raw(layer.media_type) else LayerExtraction)(staging, layer, title)


def _fetch_layer(source: ImageSource, extraction: Arrival, advance: Callable[[int], None]) -> tuple[int, int]:
    """Bring one layer, once more where its bytes were damaged, and return the bytes downloaded and read back."""
    downloaded = 0
    with extraction:
        resumed = extraction.restore()
        advance(resumed)
        unfit: RegistryError | None = None
        for _ in range(_TRIES):
            try:
                downloaded += _download(source, extraction, advance)
                unfit = None
                if _finish(extraction):
                    return downloaded, resumed
                advance(-extraction.layer.size_bytes)
            except _UnfitError as error:  # damaged on the way, or not for an image to hold: the second try tells
                unfit = error.reason
                advance(-extraction.offset)
                extraction.discard()
            resumed = 0
    raise unfit or RegistryError(
        f"{extraction.title} is damaged: its bytes are not those of {extraction.layer.digest}",
        hint=PUT_AGAIN,
    )


def _finish(extraction: Arrival) -> bool:
    """Give a layer its final name, if its bytes were right; keep nothing of it where they are, and are no layer."""
    try:
        return extraction.finish()
    except RegistryError:
        extraction.discard()
        raise


def _download(source: ImageSource, extraction: Arrival, advance: Callable[[int], None]) -> int:
    """Ask for what is missing of a layer until it is there, and return its size in bytes."""
    begin = extraction.offset
    attempt = 1
    while extraction.offset < extraction.layer.size_bytes:
        before = extraction.offset
        try:
            _stream(source, extraction, advance)
        except AnswerError as error:
            if not error.transient:
                raise
            if extraction.offset >= before + PROGRESS_BYTES:
                attempt = 1
            source.patience.pause(attempt, error)
            attempt += 1
    return extraction.offset - begin


def _stream(source: ImageSource, extraction: Arrival, advance: Callable[[int], None]) -> None:
    """Follow one answer to its end; raise AnswerError where it ends too early."""
    with source.open_blob(extraction.layer.digest, extraction.offset) as stream:
        before = extraction.offset - stream.offset  # sent again by a registry that knows no ranges
        for piece in stream.pieces:
            if source.patience.stop.is_set():
                raise AnswerError("stopped, because another part of the transfer failed")
            fresh = piece[before:]
            before = max(0, before - len(piece))
            if fresh:
                advance(len(fresh))
                try:
                    extraction.write(fresh)
                except RegistryError as error:
                    raise _UnfitError(error) from error
    if extraction.offset < extraction.layer.size_bytes:
        raise AnswerError(f"{extraction.title} ended after {extraction.offset} bytes")


def _printable(title: str | None) -> str:
    return "".join(c if c.isprintable() else "?" for c in (title or "")[:100])


def _image_path(staging: Path, resolved: Resolved) -> Path:
    return staging / f"image-{resolved.descriptor.hex[:16]}"


def _put_together(source: ImageSource, resolved: Resolved, staging: Path, target: Path) -> tuple[PulledFile, ...]:
    """Lay the layers over one another, check the checkpoint, and give it its name."""
    image = _image_path(staging, resolved)
    image.mkdir(exist_ok=True)
    (staging / _MOVED).touch()
    paths = raw_paths(resolved.manifest, source.name)
    layers = [layer.hex for layer in resolved.manifest.layers]
    for hex_digest in reversed(list(dict.fromkeys(reversed(layers)))):  # a layer that occurs twice counts where last
        if hex_digest in paths:
            place_raw(staging / f"{hex_digest}.raw" / "file", image, paths[hex_digest], source.name)
        else:
            _overlay(staging / hex_digest / "files", image, source.name)
    try:
        Checkpoint.open(image)
    except CheckpointError as error:
        _remove(staging)
        message = error.message.replace(str(image), "/models")
        raise CheckpointError(f"{source.name} holds no whole checkpoint: {message}", hint=error.hint) from error
    files = tuple(
        PulledFile(path=str(path.relative_to(image)), size_bytes=path.stat().st_size, mtime_ns=path.stat().st_mtime_ns)
        for path in sorted(image.rglob("*"))
        if path.is_file()
    )
    origin = _Origin(digest=resolved.descriptor.digest, files=files)
    write_atomic(_origin_path(target), origin.model_dump_json(indent=1))
    publish(image, target)
    _remove(staging)
    return files


def _remove(staging: Path) -> None:
    """Remove what was brought; directories first, as long as `_MOVED` tells a later pull that they are not whole."""
    held = list(staging.iterdir())
    for path in held:
        if path.is_dir():
            shutil.rmtree(path)
    for path in held:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # see `_staging`
        staging.rmdir()


def _overlay(layer: Path, image: Path, name: str) -> None:
    """Move the files of a layer over those of the layers below. A second run finds some moved, and moves the rest."""
    for folder, subfolders, names in os.walk(layer):
        below = image / Path(folder).relative_to(layer)
        try:
            below.mkdir(exist_ok=True)
            for file_name in names:
                (Path(folder) / file_name).replace(below / file_name)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise RegistryError(
                f"{name} holds {below.relative_to(image)} both as a file and as a directory",
                hint="build the image again, from one directory",
            ) from error
        subfolders.sort()
