"""What is attached to an image about it: bill of materials, provenance, validation report, signatures.

Without a key each document is attached as it is, and anybody who may push could have written it. With one, each becomes
a signed statement about the image's digest, and two signatures are added: of the image, as cosign has them, and of the
checkpoint's files, as the OpenSSF's model-signing has them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict

from gemma_pack.errors import InvalidUsageError
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.contents import file_digests
from gemma_pack.oci.describe import describe
from gemma_pack.oci.image import created_time
from gemma_pack.oci.labels import variant_title
from gemma_pack.oci.provenance import provenance
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.referrers import Attachment, attach
from gemma_pack.oci.retry import Retry
from gemma_pack.oci.sbom import SBOM_TYPE, bill_of_materials
from gemma_pack.oci.signing import BUNDLE_TYPE, PAYLOAD_TYPE
from gemma_pack.oci.source import is_layout
from gemma_pack.oci.statement import (
    PROVENANCE_PREDICATE,
    SBOM_PREDICATE,
    SIGNATURE_PREDICATE,
    TEST_RESULT_PREDICATE,
    Statement,
    about_image,
    model_signature,
    test_result,
)
from gemma_pack.record import read_record
from gemma_pack.report import REPORT_NAME, read_report, report_directory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.oci.describe import ImageDescription
    from gemma_pack.oci.reference import Reference
    from gemma_pack.oci.signing import SigningKey
    from gemma_pack.report import Report

REPORT_TYPE: Final = "application/vnd.gemma-pack.report.v1+json"


class AttachedDocument(BaseModel):
    """One document that was attached to an image."""

    model_config = ConfigDict(frozen=True)

    kind: str
    digest: str
    """Of its manifest."""
    signer: str | None
    """None where nobody signed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    """One document, and the statement that it becomes when it is signed."""

    kind: str
    artifact_type: str
    data: bytes
    title: str
    predicate_type: str
    predicate: dict[str, Any]


def find_report(source: Path, given: Path | None, reporter: Reporter) -> Report | None:
    """Return the report on the variant in a layout or a directory: the one given, else the one that lies beside it.

    It is the one that the record names, or one on these very weights, which are then read to see.

    Raises:
        InvalidUsageError: the report that was given is about another variant. One beside it is passed over then.
        GemmaPackError: the report is missing or broken.
    """
    place = given or report_directory(source)
    if given is None and not (place / REPORT_NAME).is_file():
        return None
    report = read_report(place)
    record = describe(source).record if is_layout(source) else read_record(source)
    if record and record.validation and record.validation.report_sha256 == report.digest():
        return report
    if set(report.subject.files) <= set(file_digests(source, reporter)):
        return report
    if given:
        raise InvalidUsageError(f"the report in {place} is about another variant than {source}", hint="validate it")
    reporter.warn(f"the report in {place} is about other weights than {source} and is not attached")
    return None


def attach_evidence(
    reference: Reference | str,
    source: Path,
    *,
    report: Report | None,
    key: SigningKey | None = None,
    plain_http: bool = False,
    ca_file: Path | None = None,
    retry: Retry | None = None,
    reporter: Reporter,
) -> list[AttachedDocument]:
    """Attach what is known of a pushed image to it.

    Args:
        reference: of the image; its digest is asked for first, and nothing goes by the tag after that.
        source: the layout or directory that was pushed; with a key its files are read, and signed, too.
        report: of its validation, where there is one.
        key: signs everything, where it is given.
        plain_http: speak HTTP without TLS to a registry that is not on this machine.
        ca_file: certificates to trust besides the system's.
        retry: patience with the registry.
        reporter: hears of progress.

    Raises:
        CheckpointError: the record is broken.
        RegistryError: the registry refuses it.
        AccessError: the registry wants a login, or another one.
        OfflineError: the registry cannot be reached.
    """
    reference = parse_reference(reference) if isinstance(reference, str) else reference
    retry = (retry or Retry()).telling(reporter.status)
    image = describe(reference, plain_http=plain_http, ca_file=ca_file, retry=retry)
    name = variant_title(image.record) if image.record else reference.repository.rpartition("/")[2]
    documents = [*_origin_documents(image, name, report), *([_report_document(report)] if report else [])]
    attachments = {document.kind: _attachment(document, image.digest, name, key) for document in documents}
    if key:
        signed = about_image(image.digest, name, SIGNATURE_PREDICATE, {})
        attachments["signature"] = _bundle(signed, "signature.sigstore.json", key)
        files = model_signature(name, file_digests(source, reporter))
        attachments["model signature"] = _bundle(files, "model.sig", key)
    return _attach(
        reference.pinned(image.digest), attachments, key, plain_http=plain_http, ca_file=ca_file, retry=retry
    )


def attach_report(
    reference: Reference,
    report: Report,
    *,
    key: SigningKey | None = None,
    plain_http: bool = False,
    ca_file: Path | None = None,
    retry: Retry | None = None,
) -> AttachedDocument:
    """Attach a validation report to the image that `reference` names by digest; see `attach_evidence`."""
    if reference.digest is None:
        raise AssertionError("a report is about a digest, not about a tag")
    name = reference.repository.rpartition("/")[2]
    attachment = {"report": _attachment(_report_document(report), reference.digest, name, key)}
    return _attach(reference, attachment, key, plain_http=plain_http, ca_file=ca_file, retry=retry)[0]


def require_writable(
    reference: Reference, *, plain_http: bool = False, ca_file: Path | None = None, retry: Retry | None = None
) -> None:
    """Check that this login may attach to images of the repository, before hours are spent on what to attach.

    Raises:
        AccessError: it may not.
        RegistryError, OfflineError: the registry takes no uploads, or cannot be reached.
    """
    with RegistryClient(reference, writable=True, plain_http=plain_http, ca_file=ca_file, retry=retry) as client:
        client.cancel(client.start_upload())


def _attach(
    reference: Reference,
    attachments: Mapping[str, Attachment],
    key: SigningKey | None,
    *,
    plain_http: bool,
    ca_file: Path | None,
    retry: Retry | None,
) -> list[AttachedDocument]:
    if not attachments:
        return []
    with RegistryClient(reference, writable=True, plain_http=plain_http, ca_file=ca_file, retry=retry) as client:
        image = client.manifest(reference.target).descriptor
        attached = attach(client, image, list(attachments.values()))
    signer = f"key {key.public.key_id}" if key else None
    return [
        AttachedDocument(kind=kind, digest=descriptor.digest, signer=signer)
        for kind, descriptor in zip(attachments, attached, strict=True)
    ]


def _report_document(report: Report) -> _Document:
    """Return report.json, byte for byte as the record names it, and the test result that holds it."""
    return _Document(
        kind="report",
        artifact_type=REPORT_TYPE,
        data=report.encode(),
        title="report.json",
        predicate_type=TEST_RESULT_PREDICATE,
        predicate=test_result(report),
    )


def _origin_documents(image: ImageDescription, name: str, report: Report | None) -> list[_Document]:
    """Return what the record lets us say: the bill of materials and, of a variant, the provenance."""
    record = image.record
    if record is None:
        return []
    sbom = bill_of_materials(image, record, name, report.subject.files if report else ())
    documents = [
        _Document(
            kind="sbom",
            artifact_type=SBOM_TYPE,
            data=sbom,
            title="sbom.cdx.json",
            predicate_type=SBOM_PREDICATE,
            predicate=json.loads(sbom),
        )
    ]
    origin = provenance(record)
    if origin:
        documents.append(
            _Document(
                kind="provenance",
                artifact_type=PAYLOAD_TYPE,
                data=about_image(image.digest, name, PROVENANCE_PREDICATE, origin).encode(),
                title="provenance.intoto.json",
                predicate_type=PROVENANCE_PREDICATE,
                predicate=origin,
            )
        )
    return documents


def _attachment(document: _Document, digest: str, name: str, key: SigningKey | None) -> Attachment:
    if key is None:
        return Attachment(artifact_type=document.artifact_type, data=document.data, title=document.title)
    statement = about_image(digest, name, document.predicate_type, document.predicate)
    return _bundle(statement, f"{document.title.partition('.')[0]}.sigstore.json", key)


def _bundle(statement: Statement, title: str, key: SigningKey) -> Attachment:
    """Return a signed statement as cosign attaches it (specs/BUNDLE_SPEC.md, "Annotations")."""
    return Attachment(
        artifact_type=BUNDLE_TYPE,
        data=key.sign(statement),
        title=title,
        annotations={
            "dev.sigstore.bundle.content": "dsse-envelope",
            "dev.sigstore.bundle.predicateType": statement.predicate_type,
            "org.opencontainers.image.created": created_time(),
        },
    )
