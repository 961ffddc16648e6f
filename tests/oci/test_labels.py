"""Labels and annotations: read from the record and the config, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import CheckpointError
from gemma_pack.oci.labels import image_annotations, image_labels
from gemma_pack.record import (
    QuantizationRecord,
    Record,
    SourceRecord,
    TextRecord,
    UntouchedProof,
    ValidationRecord,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXT = TextRecord(spec="builtin", sha256="0" * 64, windows=2, sequence_length=16, seed=0)
EPOCH = "1970-01-01T00:00:00Z"
RECORD = Record(
    source=SourceRecord(kind="hub", model_id="google/gemma-3-270m-it", revision="c" * 40, files=()),
    quantization=QuantizationRecord(
        recipe="w4a16",
        recipe_sha256="1" * 64,
        scheme="int4 weights in groups of 128",
        algorithm="gptq",
        device="cpu",
        versions={},
        untouched=UntouchedProof(changed=(), untouched=3, sha256="2" * 64),
        base_size_bytes=2,
        size_bytes=1,
    ),
    validation=ValidationRecord(
        verdict="pass", report_sha256="3" * 64, engine="transformers", profile="quick", evaluation=TEXT, metrics=()
    ),
)


def test_a_variant_says_what_it_is_from_its_record(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    RECORD.write(directory)
    texts = image_annotations(Checkpoint.open(directory), EPOCH)
    assert texts == {
        "gemma-pack.model": "google/gemma-3-270m-it",
        "gemma-pack.recipe": "w4a16",
        "gemma-pack.recipe.sha256": "1" * 64,
        "gemma-pack.record.sha256": hashlib.sha256((directory / "gemma-pack.json").read_bytes()).hexdigest(),
        "gemma-pack.report.sha256": "3" * 64,
        "gemma-pack.scheme": "int4 weights in groups of 128",
        "gemma-pack.verdict": "pass",
        "org.opencontainers.image.created": EPOCH,
        "org.opencontainers.image.description": (
            f"google/gemma-3-270m-it at {'c' * 40}, quantized by recipe w4a16: int4 weights in groups of 128. "
            "Validation against its base: pass."
        ),
        "org.opencontainers.image.licenses": "LicenseRef-gemma",
        "org.opencontainers.image.revision": "c" * 40,
        "org.opencontainers.image.title": "gemma-3-270m-it-quantized.w4a16",
        "org.opencontainers.image.url": "https://huggingface.co/google/gemma-3-270m-it",
    }
    assert list(texts) == sorted(texts)


def test_labels_add_red_hats_names(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    RECORD.write(directory)
    texts = image_annotations(Checkpoint.open(directory), EPOCH)
    found = image_labels(texts)
    assert texts.items() <= found.items()
    assert {key: found[key] for key in sorted(found.keys() - texts.keys())} == {
        "description": texts["org.opencontainers.image.description"],
        "io.k8s.description": texts["org.opencontainers.image.description"],
        "io.k8s.display-name": "gemma-3-270m-it-quantized.w4a16",
        "io.openshift.tags": "model,gemma,modelcar",
        "model.commit": "c" * 40,
        "model.name": "google/gemma-3-270m-it",
        "name": "gemma-3-270m-it-quantized.w4a16",
        "summary": "gemma-3-270m-it-quantized.w4a16",
        "url": "https://huggingface.co/google/gemma-3-270m-it",
    }


def test_the_base_says_that_it_is_a_dequantized_gguf(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    source = SourceRecord(
        kind="demo", model_id="google/gemma-3-270m-it", files=(), license="apache-2.0", note="Dequantized from a GGUF."
    )
    Record(source=source).write(directory)
    texts = image_annotations(Checkpoint.open(directory), EPOCH)
    assert texts["org.opencontainers.image.description"] == "google/gemma-3-270m-it. Dequantized from a GGUF."
    assert texts["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert texts["org.opencontainers.image.title"] == "gemma-3-270m-it"
    assert "org.opencontainers.image.url" not in texts
    assert "org.opencontainers.image.revision" not in texts


@pytest.mark.parametrize(
    ("config", "description"),
    [
        (
            {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "torch_dtype": "bfloat16"},
            "A checkpoint of Gemma2ForCausalLM, bfloat16; its origin is not recorded.",
        ),
        (
            {"architectures": ["A", "B"], "quantization_config": {"quant_method": "compressed-tensors"}},
            "A checkpoint of A, B, quantized (compressed-tensors); its origin is not recorded.",
        ),
        ({}, "A checkpoint of an unnamed architecture, unquantized; its origin is not recorded."),
    ],
)
def test_without_a_record_only_the_config_speaks(
    raw_checkpoint: Callable[..., Path], config: dict[str, object], description: str
) -> None:
    directory = raw_checkpoint(files={"config.json": json.dumps(config)})
    texts = image_annotations(Checkpoint.open(directory), EPOCH)
    assert texts == {
        "org.opencontainers.image.created": EPOCH,
        "org.opencontainers.image.description": description,
        "org.opencontainers.image.title": config.get("model_type", "model"),
    }


def test_a_broken_record_is_an_error_and_not_the_lack_of_one(raw_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="no valid record"):
        image_annotations(Checkpoint.open(raw_checkpoint(files={"gemma-pack.json": "{}"})), EPOCH)
