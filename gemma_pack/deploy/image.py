"""The packaged variant that is to be served, as a registry describes it: what every target starts from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.deploy.options import MAX_NAME_LENGTH
from gemma_pack.deploy.server import require_servable
from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma_pack.record import Record

_PINNED: Final = re.compile(r"[^\s@\"']+/[^\s@\"']+@sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedImage:
    """An image in a registry and what is inside.

    Attributes:
        reference: `host/name@sha256:…`; a tag may move, so nothing is deployed by tag.
        tag: the tag that it was found by, for people.
        size_bytes: of all layers, as a node pulls them.
        record: gemma-pack.json of the variant; None for an image that something else made.
        config: config.json of the variant.
        answers_chat: whether it has a chat template, and so answers turns; otherwise it continues text.
        is_artifact: whether it holds raw files, which ilab reads, and not a modelcar's file system.
        report_verdict: of the validation report that is attached to it; None where there is none.
        report_signer: who signed that report; None for nobody.
    """

    reference: str
    tag: str | None
    size_bytes: int
    record: Record | None
    config: Mapping[str, Any]
    answers_chat: bool = False
    is_artifact: bool = False
    report_verdict: str | None = None
    report_signer: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is not pinned, and what no server loads."""
        if not _PINNED.fullmatch(self.reference):
            raise InvalidUsageError(
                f"{self.reference} is not pinned by digest", hint="pass host/name@sha256:…, as push prints it"
            )
        require_servable(self.config, self.reference)

    @property
    def host(self) -> str:
        """The registry, with its port."""
        return self.reference.partition("/")[0]

    @property
    def name(self) -> str:
        """A name for what serves it, from the repository: a DNS label that begins with a letter."""
        repository = self.reference.partition("@")[0].rsplit("/", 1)[1]
        label = re.sub(r"[^a-z0-9]+", "-", repository.lower()).strip("-")
        label = label if label[:1].isalpha() else f"model-{label}".rstrip("-")
        return label[:MAX_NAME_LENGTH].rstrip("-")

    @property
    def short_digest(self) -> str:
        """What tells the images of one repository apart in the name of a directory."""
        return self.reference.rpartition(":")[2][:12]

    @property
    def weights_bytes(self) -> int:
        """Tensor bytes of the variant; without a record the size of the image, which is little more."""
        quantization = self.record.quantization if self.record else None
        return quantization.size_bytes if quantization else self.size_bytes

    @property
    def verdict(self) -> str | None:
        """How its validation ended, by the report that is attached to it, else by its record; None without one."""
        recorded = self.record.validation.verdict if self.record and self.record.validation else None
        return self.report_verdict or recorded

    def require_modelcar(self) -> None:
        """Raise InvalidUsageError if it has no file system to mount or unpack."""
        if self.is_artifact:
            raise InvalidUsageError(
                f"{self.reference} is an artifact of raw files, which only rhelai serves",
                hint="choose --target rhelai, or name the modelcar: gemma-pack push DIR REF makes and pushes one",
            )

    def describe(self) -> list[str]:
        """Return what a reader of a manifest wants to know about the weights, a sentence a line."""
        lines = [f"Weights: {self.reference}" + (f" (tag {self.tag} when this was written)" if self.tag else "")]
        if self.record is None:
            return [*lines, "The image carries no record of its origin."]
        source, quantization = self.record.source, self.record.quantization
        lines.append(f"Base: {source.model_id}" + (f" at {source.revision}" if source.revision else ""))
        if source.note:
            lines.append(f"Note: {source.note}")
        if quantization:
            lines.append(f"Recipe: {quantization.recipe} ({quantization.scheme})")
        lines.append(f"Validation: {self.verdict or 'none'}")
        if self.report_signer:
            lines.append(f"Report signed by: {self.report_signer}")
        return lines
