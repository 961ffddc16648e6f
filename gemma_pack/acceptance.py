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
from typing import TYPE_CHECKING, Any

from gemma_pack.disk import write_atomic
from gemma_pack.errors import AccessError, CheckpointError, InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma_pack.console import Reporter
    from gemma_pack.oci.describe import ImageDescription
    from gemma_pack.oci.evidence import AttachedDocument
    from gemma_pack.oci.reference import Reference
    from gemma_pack.oci.signing import PublicKey, SigningKey
    from gemma_pack.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How the registry is reached, whom to trust, and whether to write to it."""

    key: SigningKey | None = None
    """Signs the report that is attached."""
    trusted: PublicKey | None = None
    """The image must be signed with it; None asks for no signature."""
    attach: bool = True
    plain_http: bool = False
    ca_file: Path | None = None

    @property
    def network(self) -> dict[str, Any]:
        """What everything that asks the registry takes."""
        return {"plain_http": self.plain_http, "ca_file": self.ca_file}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatedImage:
    """The verdict on an image, who signed the image, and what was attached to it."""

    name: str
    """Of the variant."""
    image: str
    """By digest."""
    report: Report
    signers: tuple[str, ...]
    attached: AttachedDocument | None

    def lines(self) -> list[str]:
        """Return what to tell a person besides the report."""
        lines = [f"{self.image}, signed by {', '.join(self.signers) or 'nobody'}"]
        if self.attached:
            lines.append(f"attached: the report, {self.attached.digest}; signed by {self.attached.signer or 'nobody'}")
        return lines


def is_reference(text: str) -> bool:
    """Tell the name of an image in a registry from a path: there is no such path, and it begins with a host.

    The short names of Docker Hub are not taken for images here: they look like any directory that was mistyped.
    """
    first, slash, _ = text.partition("/")
    return (
        bool(slash) and not Path(text).exists() and (first == "localhost" or any(c in first.lstrip(".") for c in ".:"))
    )


def is_image(text: str) -> bool:
    """Tell the name of an image or the path of a layout from the directory of a variant."""
    from gemma_pack.oci.source import is_layout

    return is_reference(text) or is_layout(Path(text))


def validate_image(image: str, target: Path, access: Access, *, reporter: Reporter, **settings: Any) -> ValidatedImage:  # noqa: ANN401 - those of validate_variant
    """Pull an image by its digest, validate the variant in it, and attach the report to that digest.

    Args:
        image: a reference, or the path of a layout, to which nothing can be attached.
        target: the directory of the report.
        access: to the registry.
        reporter: told of progress.
        settings: what `validate_variant` takes besides.

    Raises:
        RegistryError: there is no such image, it is damaged, or not signed with the key that is trusted.
        CheckpointError: it holds no checkpoint, or nobody recorded how it was made.
        MachineError: the disk has no room.
        AccessError, OfflineError: the registry wants a login, or cannot be reached.
        Whatever `validate_variant` raises.
    """
    from gemma_pack.build import validate_variant
    from gemma_pack.oci.describe import describe
    from gemma_pack.oci.evidence import attach_report
    from gemma_pack.oci.reference import parse_reference

    found = describe(image if is_reference(image) else Path(image), **access.network)
    if found.record is None:
        raise CheckpointError(
            f"{found.name} has no record of how it was made, so there is no gate to judge it by",
            hint="images that gemma-pack packaged have one",
        )
    signers = _signers(found, access)
    reference = parse_reference(found.pinned) if found.pinned else None
    if reference and access.attach:
        _require_writable(reference, access)
    with _checked_copy(found, image, access, reporter) as directory:
        report = validate_variant(directory, target, reporter=reporter, **settings)
        name = directory.name
    attached = (
        attach_report(reference, report, key=access.key, **access.network) if reference and access.attach else None
    )
    return ValidatedImage(
        name=name, image=found.pinned or f"{image}@{found.digest}", report=report, signers=signers, attached=attached
    )


def _signers(found: ImageDescription, access: Access) -> tuple[str, ...]:
    """Return who signed the image; raise RegistryError unless the one who must have signed it is among them."""
    from gemma_pack.oci.examination import examine, require_signature

    if found.pinned is None:
        if access.trusted:
            raise InvalidUsageError(
                "signatures are attached to images in a registry, and a layout has none", hint="leave out --verify-key"
            )
        return ()
    evidence = examine(found, key=access.trusted, **access.network)
    if access.trusted:
        require_signature(evidence, found.pinned)
    signatures = [one for one in evidence if one.kind == "signature" and one.signed in {"verified", "unverified"}]
    return tuple(f"{one.signer}{'' if one.signed == 'verified' else ' (not checked)'}" for one in signatures)


def _require_writable(reference: Reference, access: Access) -> None:
    from gemma_pack.oci.evidence import require_writable

    try:
        require_writable(reference, **access.network)
    except AccessError as error:
        raise AccessError(error.message, hint=f"--no-attach leaves the image as it is; or {error.hint}") from error


@contextmanager
def _checked_copy(found: ImageDescription, image: str, access: Access, reporter: Reporter) -> Iterator[Path]:
    """Yield the variant's directory, every byte of it checked; what is done to it is gone afterwards."""
    from gemma_pack.oci.pull import pull
    from gemma_pack.oci.reference import parse_reference
    from gemma_pack.sources import cache_directory

    source = parse_reference(found.pinned) if found.pinned else Path(image)
    place = cache_directory() / "images" / found.digest.removeprefix("sha256:")
    copy = place / "checkpoint"
    if not _is_unchanged(place, reporter):
        shutil.rmtree(copy, ignore_errors=True)
        pull(source, copy, **access.network, reporter=reporter)
        _note_files(place, reporter)
    with tempfile.TemporaryDirectory(prefix="work-", dir=place) as work:
        directory = Path(work) / _name(found)
        shutil.copytree(copy, directory, copy_function=os.link)
        yield directory


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
