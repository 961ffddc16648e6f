"""SLSA provenance of a variant: from which files, by which recipe, with which text and libraries it was made.

All of it is the record's; what differs between two identical runs, such as a time, is left out.

Source: https://slsa.dev/spec/v1.1/provenance; purl-spec types `huggingface`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from gemma_pack.record import QuantizationRecord, Record, SourceRecord, TextRecord

BUILD_TYPE: Final = "urn:gemma-pack:quantize:v1"
"""External parameters: the recipe and the calibration text. Dependencies: each file of the base, and that text."""
BUILDER: Final = "urn:gemma-pack"


def provenance(record: Record) -> dict[str, Any] | None:
    """Return the SLSA predicate of a variant; None for a checkpoint that was not quantized here."""
    quantization = record.quantization
    if quantization is None:
        return None
    byproducts = []
    if record.validation:
        byproducts.append({"name": "report.json", "digest": {"sha256": record.validation.report_sha256}})
    byproducts.append({"name": "untouched tensors", "digest": {"sha256": quantization.untouched.sha256}})
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": _parameters(record.source, quantization),
            "internalParameters": {"device": quantization.device},
            "resolvedDependencies": [*_base_files(record.source), *_texts(quantization)],
        },
        "runDetails": {
            "builder": {
                "id": BUILDER,
                "version": {"gemma-pack": record.gemma_pack_version, **quantization.versions},
            },
            "byproducts": byproducts,
        },
    }


def source_purl(source: SourceRecord) -> str | None:
    """Return the package URL of a base from the hub; None for one that no URL names."""
    if source.kind != "hub":
        return None
    return f"pkg:huggingface/{source.model_id}" + (f"@{source.revision.lower()}" if source.revision else "")


def _parameters(source: SourceRecord, quantization: QuantizationRecord) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "model": source.model_id,
        "revision": source.revision,
        "recipe": quantization.recipe,
        "recipeSha256": quantization.recipe_sha256,
        "calibration": _text(quantization.calibration),
    }
    return {key: value for key, value in parameters.items() if value is not None}


def _text(text: TextRecord | None) -> dict[str, Any] | None:
    return text.model_dump(mode="json", include={"spec", "windows", "sequence_length", "seed"}) if text else None


def _base_files(source: SourceRecord) -> list[dict[str, Any]]:
    """Return a resource descriptor for each file of the base, and one for the commit that they are of."""
    purl = source_purl(source)
    commit = [{"uri": purl, "digest": {"gitCommit": source.revision}}] if purl and source.revision else []
    files = []
    for file in source.files:
        named = {"uri": f"{purl}#{file.path}"} if purl else {}
        files.append({"name": f"{source.model_id}: {file.path}", **named, "digest": {"sha256": file.sha256}})
    return [*commit, *files]


def _texts(quantization: QuantizationRecord) -> list[dict[str, Any]]:
    """Return a resource descriptor for each text; the digest is over the token ids of its windows."""
    named = {
        "calibration": quantization.calibration,
        "refinement": quantization.refinement.text if quantization.refinement else None,
    }
    return [
        {"name": f"{use} windows of {text.spec}", "digest": {"sha256": text.sha256}}
        for use, text in named.items()
        if text
    ]
