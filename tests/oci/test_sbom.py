"""Bill of materials and provenance: all that the record says, in the forms that were published."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from gemma_pack.oci.describe import ImageDescription, LayerDescription
from gemma_pack.oci.provenance import provenance, source_purl
from gemma_pack.oci.sbom import bill_of_materials
from gemma_pack.record import FileDigest, Record
from tests.records import quantized_record, validation_record

DIGEST = "sha256:" + "5d" * 32
FILES = (FileDigest(path="model.safetensors", sha256="ab" * 32, size_bytes=1),)


def image() -> ImageDescription:
    layer = LayerDescription(title="tokenizer.tar", media_type="tar", digest="sha256:" + "cd" * 32, size_bytes=7)
    return ImageDescription(
        name="gemma", digest=DIGEST, pinned=None, platforms=(), size_bytes=7, layers=(layer, layer), record=None,
        config={"architectures": ["Gemma2ForCausalLM"]}, has_chat_template=False,
    )  # fmt: skip


def records() -> dict[str, Record]:
    whole = quantized_record().model_copy(update={"validation": validation_record()})
    return {
        "a variant that was validated": whole,
        "a variant": quantized_record(),
        "a base": whole.model_copy(update={"quantization": None, "validation": None}),
        "the demo": quantized_record(kind="demo", revision=None, note="a dequantized GGUF"),
    }


@pytest.mark.parametrize("record", records().values(), ids=records())
def test_it_keeps_to_the_published_schema_and_comes_out_the_same(record: Record):
    sbom = bill_of_materials(image(), record, "gemma", FILES)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom.decode()) is None
    assert bill_of_materials(image(), record, "gemma", FILES) == sbom


def test_it_says_what_the_record_says():
    record = records()["a variant that was validated"]
    sbom = json.loads(bill_of_materials(image(), record, "gemma-2-9b-it-quantized.w4a16", FILES))
    model = sbom["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "gemma-2-9b-it-quantized.w4a16")
    assert model["version"] == DIGEST
    assert model["components"][0]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    (base,) = model["pedigree"]["ancestors"]
    assert base["purl"] == f"pkg:huggingface/google/gemma-2-9b-it@{'c' * 40}"
    assert [file["hashes"][0]["content"] for file in base["components"]] == ["f0" * 32]
    assert [layer["name"] for layer in sbom["components"]] == ["tokenizer.tar"]
    assert {tool["name"]: tool["version"] for tool in sbom["metadata"]["tools"]["components"]}["torch"] == "2.13.0"
    card = model["modelCard"]
    assert card["modelParameters"]["modelArchitecture"] == "Gemma2ForCausalLM"
    assert [text["name"].partition(":")[0] for text in card["modelParameters"]["datasets"]] == [
        "calibration", "refinement", "evaluation",
    ]  # fmt: skip
    measured = {one["type"]: one["value"] for one in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert measured["kl_nats (nats)"] == "0.0312"
    assert {"name": "gemma-pack:verdict", "value": "pass"} in card["properties"]


def test_the_time_is_that_of_the_commit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    sbom = json.loads(bill_of_materials(image(), quantized_record(), "gemma"))
    assert sbom["metadata"]["timestamp"].startswith("2023-11-14T22:13:20")


def test_provenance_names_every_input():
    found: Any = provenance(records()["a variant that was validated"])
    build = found["buildDefinition"]
    assert build["externalParameters"]["recipe"] == "w4a16"
    assert build["externalParameters"]["calibration"]["seed"] == 7
    digests = [one["digest"] for one in build["resolvedDependencies"]]
    assert digests == [
        {"gitCommit": "c" * 40}, {"sha256": "f0" * 32}, {"sha256": "a1" * 32}, {"sha256": "a1" * 32},
    ]  # fmt: skip
    assert all("name" in one or "uri" in one for one in build["resolvedDependencies"])
    assert found["runDetails"]["builder"]["version"]["llmcompressor"] == "0.14.0.1"
    assert {"name": "report.json", "digest": {"sha256": "e4" * 32}} in found["runDetails"]["byproducts"]


def test_what_was_not_quantized_has_no_provenance_and_what_has_no_page_no_url():
    assert provenance(records()["a base"]) is None
    assert source_purl(records()["the demo"].source) is None
    found: Any = provenance(records()["the demo"])
    assert "uri" not in found["buildDefinition"]["resolvedDependencies"][0]
