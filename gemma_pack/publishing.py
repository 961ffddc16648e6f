"""The last stage of a build: what has passed goes to the registry, comes back, is compared, and gets its evidence."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_pack.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_pack.console import Reporter
    from gemma_pack.matrix import Wanted
    from gemma_pack.oci.signing import SigningKey
    from gemma_pack.outcome import BuiltImage, VariantOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """How to speak to it, and what signs what is attached."""

    plain_http: bool = False
    ca_file: Path | None = None
    key: SigningKey | None = None

    def network(self) -> dict[str, Any]:
        """Return what every command that speaks to a registry takes."""
        return {"plain_http": self.plain_http, "ca_file": self.ca_file}


def require_registries(wanted: Sequence[Wanted], registry: Registry) -> None:
    """Check that this login may push to each repository, before hours are spent on what to push.

    Raises:
        InvalidUsageError: a repository or a tag is misspelt.
        AccessError: the login may not.
        RegistryError, OfflineError: the registry takes no uploads, or cannot be reached.
    """
    from gemma_pack.oci.evidence import require_writable
    from gemma_pack.oci.reference import parse_reference

    references = [parse_reference(f"{one.repository}:{one.recipe.name}") for one in wanted if one.repository]
    for reference in {one.repository: one for one in references}.values():
        require_writable(reference, **registry.network())


def publish(outcome: VariantOutcome, repository: str, registry: Registry, reporter: Reporter) -> VariantOutcome:
    """Push the images of a variant that has passed its gate; any other stays here.

    The first image has the recipe's name as its tag; an artifact beside a modelcar has `-artifact` behind it, because
    no consumer of the one can use the other.
    """
    if outcome.word != "pass":
        reporter.warn(f"{outcome.recipe} of {outcome.model} has not passed and is not pushed")
        return outcome
    try:
        images: list[BuiltImage] = []
        for image in outcome.images:
            suffix = "-artifact" if images else ""
            pinned = _push(image, f"{repository}:{outcome.recipe}{suffix}", outcome, registry, reporter)
            images.append(image.model_copy(update={"pinned": pinned}))
        return outcome.model_copy(update={"images": tuple(images)})
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this variant's, and it is shown
        return outcome.failed("push", error)


def _push(image: BuiltImage, reference: str, outcome: VariantOutcome, registry: Registry, reporter: Reporter) -> str:
    """Push one image, pull it back, compare every file and attach what is known; return the reference by digest."""
    from gemma_pack.checkpoint import file_sha256
    from gemma_pack.oci.contents import file_digests
    from gemma_pack.oci.evidence import attach_evidence
    from gemma_pack.oci.pull import pull
    from gemma_pack.oci.push import push

    directory = outcome.directory
    pushed = push(image.layout, reference, **registry.network(), reporter=reporter)
    with tempfile.TemporaryDirectory(prefix=".pulled-", dir=directory.parent) as name:
        copy = Path(name) / directory.name
        pull(pushed.pinned, copy, **registry.network(), reporter=reporter)
        for file in file_digests(directory, reporter):  # what packaging takes: not .nfs files, nor .DS_Store
            twin = copy / file.path
            if not twin.is_file() or file_sha256(twin) != file.sha256:
                raise RegistryError(
                    f"{file.path} came back from {reference} with other bytes",
                    hint="push again; the registry lost some",
                )
    attach_evidence(
        pushed.pinned, image.layout, report=outcome.report, key=registry.key, **registry.network(), reporter=reporter
    )
    return pushed.pinned
