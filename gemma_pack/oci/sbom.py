"""The bill of materials of an image: CycloneDX 1.6, with the variant as a machine-learning model.

Base, files, layers, texts, libraries and figures are those of the record and the manifest. The same image gives the
same bytes: the serial number follows from its digest, and the time is SOURCE_DATE_EPOCH or 1970.

Source: https://cyclonedx.org/docs/1.6/json/. The library that writes it knows no model card yet; that part is put in
after it, and held to the published schema by the tests.
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.oci.image import created_time
from gemma_pack.oci.labels import HUB_PAGE
from gemma_pack.oci.manifest import encode_json
from gemma_pack.oci.provenance import source_purl

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cyclonedx.model.component import Component

    from gemma_pack.oci.describe import ImageDescription
    from gemma_pack.record import FileDigest, Record, TextRecord, ValidationRecord

SBOM_TYPE: Final = "application/vnd.cyclonedx+json"
_MODEL_REF: Final = "variant"
_BASE_REF: Final = "base"


def bill_of_materials(image: ImageDescription, record: Record, name: str, files: Sequence[FileDigest] = ()) -> bytes:
    """Return the CycloneDX document of `image`, whose variant `record` describes and which is called `name`.

    `files` are those of the variant whose digests are known; those of the base are in the record.
    """
    from datetime import datetime

    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Pedigree
    from cyclonedx.model.dependency import Dependency
    from cyclonedx.output.json import JsonV1Dot6

    model = _model(image, record, name)
    layers = _layers(image)
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, image.digest),
        metadata=BomMetaData(component=model, tools=_tools(record), timestamp=datetime.fromisoformat(created_time())),
        components=layers,
        dependencies=[
            Dependency(ref=model.bom_ref, dependencies=[Dependency(ref=layer.bom_ref) for layer in layers]),
        ],
    )
    model.components.update(_files(files, _MODEL_REF))
    model.pedigree = Pedigree(ancestors=[_base(record)])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    document["metadata"]["component"]["modelCard"] = _model_card(image, record)
    return encode_json(document)


def _model(image: ImageDescription, record: Record, name: str) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    quantization = record.quantization
    said = {"record.sha256": record.digest()}
    if quantization:
        said |= {
            "recipe": quantization.recipe,
            "recipe.sha256": quantization.recipe_sha256,
            "scheme": quantization.scheme,
            "algorithm": quantization.algorithm,
            "format": quantization.format,
            "tensor.bytes": str(quantization.size_bytes),
            "base.tensor.bytes": str(quantization.base_size_bytes),
            "untouched.tensors": str(quantization.untouched.untouched),
            "untouched.sha256": quantization.untouched.sha256,
        }
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=_MODEL_REF,
        name=name,
        version=image.digest,
        purl=PackageURL("oci", name=name.lower(), version=image.digest),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=image.digest.removeprefix("sha256:"))],
        licenses=_licenses(record),
        properties=[Property(name=f"gemma-pack:{key}", value=value) for key, value in said.items()],
    )


def _base(record: Record) -> Component:
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    source = record.source
    purl = source_purl(source)
    pages = [XsUri(HUB_PAGE + source.model_id)] if source.kind == "hub" else []
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=_BASE_REF,
        name=source.model_id,
        version=source.revision,
        description=source.note,
        purl=PackageURL.from_string(purl) if purl else None,
        external_references=[ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=page) for page in pages],
        licenses=_licenses(record),
        components=_files(source.files, _BASE_REF),
    )


def _licenses(record: Record) -> list[Any]:
    from cyclonedx.model.license import DisjunctiveLicense

    return [DisjunctiveLicense(name=record.source.license)]


def _files(files: Iterable[FileDigest], owner: str) -> list[Component]:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            type=ComponentType.FILE,
            bom_ref=f"{owner}/{file.path}",
            name=file.path,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file.sha256)],
        )
        for file in files
    ]


def _layers(image: ImageDescription) -> list[Component]:
    """Return the image's layers: a file of the checkpoint each where it is an artifact, else tars of them."""
    from gemma_pack.record import FileDigest

    layers = {layer.digest: layer for layer in image.layers}.values()
    named = [
        FileDigest(path=layer.title or layer.digest, sha256=layer.digest.removeprefix("sha256:"), size_bytes=0)
        for layer in layers
    ]
    return _files(named, "layer")


def _tools(record: Record) -> Any:  # noqa: ANN401 - the library is imported late
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.tool import ToolRepository
    from packageurl import PackageURL

    versions = {"gemma-pack": record.gemma_pack_version}
    versions |= record.quantization.versions if record.quantization else {}
    return ToolRepository(
        components=[
            Component(
                type=ComponentType.LIBRARY if name != "gemma-pack" else ComponentType.APPLICATION,
                bom_ref=f"tool/{name}",
                name=name,
                version=version,
                purl=PackageURL("pypi", name=name, version=version) if name != "gemma-pack" else None,
            )
            for name, version in versions.items()
        ]
    )


def _model_card(image: ImageDescription, record: Record) -> dict[str, Any]:
    """Return the model card object: architecture, the texts that shaped or judged the variant, and its figures."""
    quantization, validation = record.quantization, record.validation
    texts: dict[str, TextRecord | None] = {
        "calibration": quantization.calibration if quantization else None,
        "refinement": quantization.refinement.text if quantization and quantization.refinement else None,
        "evaluation": validation.evaluation if validation else None,
    }
    parameters: dict[str, Any] = {
        "task": "text-generation",
        "architectureFamily": "transformer",
        "modelArchitecture": ", ".join(map(str, image.config.get("architectures") or ())) or None,
        "datasets": [_dataset(use, text) for use, text in texts.items() if text],
    }
    card: dict[str, Any] = {"modelParameters": {key: value for key, value in parameters.items() if value}}
    if validation:
        card["quantitativeAnalysis"] = {"performanceMetrics": _metrics(validation)}
        card["properties"] = [
            {"name": "gemma-pack:verdict", "value": validation.verdict},
            {"name": "gemma-pack:report.sha256", "value": validation.report_sha256},
        ]
    return card


def _dataset(use: str, text: TextRecord) -> dict[str, Any]:
    said = {"windows": text.windows, "sequence_length": text.sequence_length, "seed": text.seed, "sha256": text.sha256}
    properties = [{"name": f"gemma-pack:{key}", "value": str(value)} for key, value in said.items()]
    return {"type": "dataset", "name": f"{use}: {text.spec}", "contents": {"properties": properties}}


def _metrics(validation: ValidationRecord) -> list[dict[str, Any]]:
    return [
        {
            "type": f"{metric.name} ({metric.unit})" if metric.unit else metric.name,
            "value": str(metric.value),
            "slice": f"{validation.evaluation.spec}, {validation.profile}",
        }
        for metric in validation.metrics
    ]
