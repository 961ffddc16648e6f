"""Reading what is attached to an image: each document, who signed it, and whether the image may be served on it.

A document that nobody signed is shown as that: whoever may push could have attached it. A signature counts only
where it was checked with a key that the reader brings, and where the statement is about this image.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotation
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemma_pack.errors import GateFailedError, GateUndecidedError, RegistryError
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.evidence import REPORT_TYPE
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.referrers import list_referrers, read_referrer
from gemma_pack.oci.retry import AnswerError
from gemma_pack.oci.sbom import SBOM_TYPE
from gemma_pack.oci.signing import BUNDLE_TYPE, PAYLOAD_TYPE, printable, read_bundle, read_statement
from gemma_pack.oci.statement import (
    MODEL_SIGNATURE_PREDICATE,
    PROVENANCE_PREDICATE,
    REPORT_FIELD,
    SBOM_PREDICATE,
    SIGNATURE_PREDICATE,
    TEST_RESULT_PREDICATE,
)
from gemma_pack.report import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_pack.oci.describe import ImageDescription
    from gemma_pack.oci.manifest import Descriptor
    from gemma_pack.oci.retry import Retry
    from gemma_pack.oci.signing import PublicKey
    from gemma_pack.oci.statement import Statement
    from gemma_pack.record import Record

Trust = Literal["nobody", "verified", "unverified", "invalid", "unread"]
"""Signed by nobody; by the key given; by someone, unchecked; wrongly; a kind of document that is not read here."""

_KINDS: Final = {
    SBOM_TYPE: "sbom",
    REPORT_TYPE: "report",
    SIGNATURE_PREDICATE: "signature",
    SBOM_PREDICATE: "sbom",
    PROVENANCE_PREDICATE: "provenance",
    MODEL_SIGNATURE_PREDICATE: "model signature",
}


class Evidence(BaseModel):
    """One document that is attached to an image."""

    model_config = ConfigDict(frozen=True)

    kind: str
    """`sbom`, `provenance`, `report`, `signature`, `model signature`, or the type of anything else."""
    digest: str
    """Of its manifest."""
    artifact_type: str
    signed: Trust
    signer: str | None = None
    """As the document names him; checked only if `signed` is `verified`."""
    problem: str | None = None
    """Why it is invalid."""
    verdict: Literal["pass", "fail", "undecided"] | None = None
    """Of a report."""
    report: Report | None = Field(default=None, exclude=True)
    data: bytes = Field(default=b"", exclude=True, repr=False)

    @property
    def file_name(self) -> str:
        """What to call the document on disk; several of a kind are told apart by their digests."""
        name = self.kind.replace(" ", "-") if self.kind in _KINDS.values() else "document"
        form = "sigstore.json" if self.artifact_type == BUNDLE_TYPE else "json"
        return f"{name}-{self.digest.removeprefix('sha256:')[:12]}.{form}"


def examine(
    image: ImageDescription,
    *,
    key: PublicKey | None = None,
    plain_http: bool = False,
    ca_file: Path | None = None,
    retry: Retry | None = None,
) -> list[Evidence]:
    """Return what is attached to an image in a registry; with a key, signatures are checked.

    A document that is damaged, or about something else, is returned as invalid: it must not hide the others.

    Raises:
        RegistryError: the registry's list of them is broken.
        AccessError, OfflineError: as `describe`.
    """
    if image.pinned is None:
        raise AssertionError("a layout has no referrers")
    reference = parse_reference(image.pinned)
    with RegistryClient(reference, plain_http=plain_http, ca_file=ca_file, retry=retry) as client:
        return [_examine(client, referrer, image, key) for referrer in list_referrers(client, image.digest)]


def require_signature(evidence: Sequence[Evidence], name: str) -> None:
    """Raise RegistryError unless the image was signed with the key that `evidence` was checked with."""
    if not any(one.kind == "signature" and one.signed == "verified" for one in evidence):
        raise RegistryError(
            f"nothing that is attached to {name} is a signature of this image by that key",
            hint="gemma-pack push --sign-key signs; gemma-pack referrers shows what is there",
        )


def require_passing_report(evidence: Sequence[Evidence], name: str, *, by_key: bool) -> Evidence:
    """Return a report that passed, if no other one says that the image failed.

    With `by_key` only reports whose signature was checked count, without it all but invalid ones.

    Raises:
        GateFailedError: a report says that it is worse than its gate allows.
        GateUndecidedError: there are reports, and none has a verdict.
        RegistryError: there is none.
    """
    allowed = {"verified"} if by_key else {"nobody", "unverified", "verified"}
    reports = [one for one in evidence if one.kind == "report" and one.signed in allowed]
    verdicts = [one.verdict for one in reports]
    anyway = "--allow-unvalidated serves it all the same"
    if "fail" in verdicts:
        raise GateFailedError(f"a report attached to {name} says that it is worse than its gate allows", hint=anyway)
    if "pass" in verdicts:
        return reports[verdicts.index("pass")]
    if reports:
        raise GateUndecidedError(f"no report attached to {name} has come to a verdict", hint=anyway)
    whose = " that is signed with that key" if by_key else ""
    raise RegistryError(
        f"{name} has no validation report{whose}", hint=f"gemma-pack validate {name} attaches one; {anyway}"
    )


def _examine(client: RegistryClient, referrer: Descriptor, image: ImageDescription, key: PublicKey | None) -> Evidence:
    kind = referrer.artifact_type or referrer.media_type
    shown = printable(kind)
    found: dict[str, Any] = {"kind": _KINDS.get(kind, shown), "digest": referrer.digest, "artifact_type": shown}
    if kind not in {SBOM_TYPE, REPORT_TYPE, PAYLOAD_TYPE, BUNDLE_TYPE}:
        return Evidence(**found, signed="unread")
    try:
        found["data"] = read_referrer(client, referrer, image.digest).data
        found |= _judge(found["data"], kind, image, key)
    except AnswerError:  # the registry's own trouble
        raise
    except RegistryError as error:
        found |= {"signed": "invalid", "problem": error.message}
    return Evidence(**found)


def _judge(data: bytes, kind: str, image: ImageDescription, key: PublicKey | None) -> dict[str, Any]:
    """Return the fields of a document that was read: kind, signer, report."""
    if kind == SBOM_TYPE:
        return {"signed": "nobody"}
    if kind == REPORT_TYPE:
        return {"signed": "nobody", **_report(data, image.record)}
    if kind == PAYLOAD_TYPE:
        return {"signed": "nobody", **_statement(read_statement(data), image)}
    bundle = read_bundle(data)
    found: dict[str, Any] = {"signed": "unverified", "signer": bundle.signer, **_statement(bundle.statement, image)}
    if key and bundle.is_signed_by(key):
        found |= {"signed": "verified", "signer": f"key {key.key_id}"}
    elif key and bundle.signer == f"key {key.key_id}":
        raise RegistryError("it names the key, and the signature is not by that key")
    return found


def _statement(statement: Statement, image: ImageDescription) -> dict[str, Any]:
    kind = statement.predicate_type
    if kind != MODEL_SIGNATURE_PREDICATE and not statement.is_about(image.digest):  # that one is about the files
        raise RegistryError("its statement is about another image")
    if kind != TEST_RESULT_PREDICATE:
        return {"kind": _KINDS.get(kind) or printable(kind)}
    if REPORT_FIELD not in statement.predicate:  # of somebody else's tests
        return {"kind": kind}
    return {"kind": "report", **_report(statement.predicate[REPORT_FIELD], image.record)}


def _report(value: Any, record: Record | None) -> dict[str, Any]:  # noqa: ANN401 - bytes, or parsed JSON
    try:
        report = Report.model_validate_json(value) if isinstance(value, bytes) else Report.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise RegistryError(f"its report is broken: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not is_about(report, record):
        raise RegistryError("its report is about another variant")
    return {"report": report, "verdict": report.verdict}


def is_about(report: Report, record: Record | None) -> bool:
    """Tell whether a report may be about the variant of a record: its recipe and the size of its tensors agree."""
    quantization = record.quantization if record else None
    if quantization is None:
        return False
    subject = report.subject
    return (subject.recipe_sha256, subject.size_bytes) == (quantization.recipe_sha256, quantization.size_bytes)
