"""Validating what was packaged: an image, by whomever, comes to lie in a cache, and that is what is judged.

The cache holds each image under its digest. Pulling checks every byte against the layers' digests and notes the
digest of every file; when the copy is used again, its files are read and compared with those. The judge works
on links to them, so that nothing that it writes gets into the cache.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_pack.disk import write_atomic
from gemma_pack.errors import CheckpointError, InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma_pack.console import Reporter
    from gemma_pack.oci.describe import ImageDescription
    from gemma_pack.oci.reference import Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedImage:
    """An image whose every byte was checked, as a variant's directory that its user may change."""

    directory: Path
    reference: Reference | None
    """By digest; None for a layout."""


def is_reference(text: str) -> bool:
    """Tell the name of an image in a registry from a path: there is no such path, and it begins with a host.

    The short names of Docker Hub are not taken for images here: they look like any directory that was mistyped.
    """
    first, slash, _ = text.partition("/")
    return (
        bool(slash) and not Path(text).exists() and (first == "localhost" or any(c in first.lstrip(".") for c in ".:"))
    )


@contextmanager
def accepted_image(
    image: str, *, plain_http: bool = False, ca_file: Path | None = None, reporter: Reporter
) -> Iterator[AcceptedImage]:
    """Yield the checked variant in the image that a reference or the path of a layout names.

    Raises:
        InvalidUsageError: `image` is neither.
        RegistryError: there is no such image, or it is damaged.
        CheckpointError: it holds no checkpoint, or nobody recorded how it was made.
        MachineError: the disk has no room.
        AccessError, OfflineError: the registry wants a login, or cannot be reached.
    """
    from gemma_pack.oci.describe import describe
    from gemma_pack.oci.pull import pull
    from gemma_pack.oci.reference import parse_reference
    from gemma_pack.sources import cache_directory

    found = describe(image, plain_http=plain_http, ca_file=ca_file)
    if found.record is None:
        raise CheckpointError(
            f"{found.name} has no record of how it was made, so there is no gate to judge it by",
            hint="images that gemma-pack packaged have one",
        )
    reference = parse_reference(found.pinned) if found.pinned else None
    place = cache_directory() / "images" / found.digest.removeprefix("sha256:")
    copy = place / "checkpoint"
    if not _is_unchanged(place, reporter):
        shutil.rmtree(copy, ignore_errors=True)
        pull(reference or Path(image), copy, plain_http=plain_http, ca_file=ca_file, reporter=reporter)
        _note_files(place, reporter)
    with tempfile.TemporaryDirectory(prefix="work-", dir=place) as work:
        directory = Path(work) / _name(found)
        shutil.copytree(copy, directory, copy_function=os.link)
        yield AcceptedImage(directory=directory, reference=reference)


def default_report_directory(image: str) -> Path:
    """Return where the report on an image goes unless told: beside a layout, or here under the reference's name."""
    from gemma_pack.oci.reference import parse_reference
    from gemma_pack.report import report_directory

    if not is_reference(image):
        return report_directory(Path(image))
    reference = parse_reference(image)
    which = reference.tag or (reference.digest or "latest").removeprefix("sha256:")[:12]
    return Path(f"{reference.repository.rpartition('/')[2]}.{which}.report")


def _name(found: ImageDescription) -> str:
    from gemma_pack.oci.labels import variant_title

    if found.record is None:
        raise AssertionError("checked before")
    title = variant_title(found.record)
    if Path(title).name != title:  # a record may come from a stranger
        raise InvalidUsageError(f"{found.name} calls its variant {title!r}, which is no name")
    return title


def _is_unchanged(place: Path, reporter: Reporter) -> bool:
    """Read the files of the cached copy, if there is one, and tell whether all are as they were pulled."""
    try:
        noted = json.loads((place / "files.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    try:
        return bool(_digests(place, reporter) == noted)
    except CheckpointError:
        return False


def _note_files(place: Path, reporter: Reporter) -> None:
    write_atomic(place / "files.json", json.dumps(_digests(place, reporter), indent=1))


def _digests(place: Path, reporter: Reporter) -> dict[str, str]:
    from gemma_pack.oci.contents import file_digests

    return {file.path: file.sha256 for file in file_digests(place / "checkpoint", reporter)}
