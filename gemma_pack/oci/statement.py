"""in-toto statements: what is claimed (a predicate) about which bytes (the subjects).

Every attestation is one: the SBOM, the provenance, the verdict, and a signature, which claims nothing but that it was
made. A predicate is identified by its type, a URI.

Sources: in-toto attestation framework, spec/v1/statement.md and spec/predicates/test-result.md; cosign,
specs/COSIGN_PREDICATE_SPEC.md and pkg/types/predicate.go; model-signing, `_signing/signing.py`, `Payload`.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from gemma_pack.oci.manifest import encode_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gemma_pack.record import FileDigest
    from gemma_pack.report import Report

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
SIGNATURE_PREDICATE: Final = "https://sigstore.dev/cosign/sign/v1"
SBOM_PREDICATE: Final = "https://cyclonedx.org/bom"
PROVENANCE_PREDICATE: Final = "https://slsa.dev/provenance/v1"
TEST_RESULT_PREDICATE: Final = "https://in-toto.io/attestation/test-result/v0.1"
MODEL_SIGNATURE_PREDICATE: Final = "https://model_signing/signature/v1.0"

REPORT_FIELD: Final = "gemmaPackReport"
"""Our extension of the test result: the whole report.json. Readers of the framework pass over what they do not know."""
_RESULTS: Final = {"pass": "PASSED", "fail": "FAILED", "undecided": "WARNED"}


class ResourceDescriptor(BaseModel):
    """Names some bytes; fields that are not needed here are passed over."""

    model_config = ConfigDict(frozen=True)

    name: str = ""
    digest: dict[str, str] = Field(default_factory=dict)


class Statement(BaseModel):
    """A claim about its subjects."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["https://in-toto.io/Statement/v1"] = Field(default=STATEMENT_TYPE, alias="_type")
    subject: tuple[ResourceDescriptor, ...] = Field(min_length=1)
    predicate_type: str = Field(alias="predicateType")
    predicate: dict[str, Any] = Field(default_factory=dict)

    def is_about(self, digest: str) -> bool:
        """Tell whether `sha256:…` is one of the subjects."""
        return any(f"sha256:{subject.digest.get('sha256')}" == digest for subject in self.subject)

    def encode(self) -> bytes:
        """Return the statement's JSON, the same for equal statements."""
        return encode_json(self.model_dump(mode="json", by_alias=True))


def about_image(digest: str, name: str, predicate_type: str, predicate: Mapping[str, Any]) -> Statement:
    """Return the statement that `predicate` holds of the image `digest`, called `name`."""
    subject = ResourceDescriptor(name=name, digest={"sha256": digest.removeprefix("sha256:")})
    return Statement(subject=(subject,), predicateType=predicate_type, predicate=dict(predicate))


def test_result(report: Report) -> dict[str, Any]:
    """Return the predicate that says how a validation ended, on what, and by which metrics."""
    named = {verdict: [one.name for one in report.metrics if one.verdict == verdict] for verdict in _RESULTS}
    recipe, text = report.subject, report.protocol.text
    return {
        "result": _RESULTS[report.verdict],
        "configuration": [
            {"name": f"recipe {recipe.recipe}", "digest": {"sha256": recipe.recipe_sha256}},
            {"name": f"evaluation text {text.spec}", "digest": {"sha256": text.sha256}},
        ],
        "passedTests": named["pass"],
        "warnedTests": named["undecided"],
        "failedTests": named["fail"],
        REPORT_FIELD: json.loads(report.encode()),
    }


def model_signature(name: str, files: Iterable[FileDigest]) -> Statement:
    """Return the statement of an OpenSSF model signature over the files of a checkpoint.

    The subject's digest is the sha256 over the files' digests, as bytes, in the order of their names.
    """
    ordered = sorted(files, key=lambda file: file.path)
    whole = hashlib.sha256(b"".join(bytes.fromhex(file.sha256) for file in ordered)).hexdigest()
    return Statement(
        subject=(ResourceDescriptor(name=name, digest={"sha256": whole}),),
        predicateType=MODEL_SIGNATURE_PREDICATE,
        predicate={
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [{"name": file.path, "algorithm": "sha256", "digest": file.sha256} for file in ordered],
        },
    )
