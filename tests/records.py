"""Records of a variant that no model stands behind, for tests of what is written from them."""

from __future__ import annotations

from gemma_pack.record import (
    FileDigest,
    Metric,
    QuantizationRecord,
    Record,
    RefinementRecord,
    SourceRecord,
    TextRecord,
    UntouchedProof,
    ValidationRecord,
)


def text_record(spec: str = "builtin", windows: int = 32) -> TextRecord:
    return TextRecord(spec=spec, sha256="a1" * 32, windows=windows, sequence_length=512, seed=7)


def quantized_record(**source: object) -> Record:
    origin = {
        "kind": "hub",
        "model_id": "google/gemma-2-9b-it",
        "revision": "c" * 40,
        "files": (FileDigest(path="model.safetensors", sha256="f0" * 32, size_bytes=1000),),
    }
    return Record(
        source=SourceRecord.model_validate(origin | source),
        quantization=QuantizationRecord(
            recipe="w4a16",
            recipe_sha256="b2" * 32,
            scheme="int4 weights in groups of 128",
            algorithm="gptq",
            calibration=text_record("HuggingFaceH4/ultrachat_200k", 512),
            refinement=RefinementRecord(
                text=text_record("own.jsonl", 96), steps=140, held_out_kl_before_nats=0.5, held_out_kl_after_nats=0.25
            ),
            device="cuda",
            versions={"torch": "2.13.0", "llmcompressor": "0.14.0.1"},
            untouched=UntouchedProof(changed=("a.weight", "b.weight"), untouched=169, sha256="d3" * 32),
            base_size_bytes=18_480_000_000,
            size_bytes=6_150_000_000,
        ),
    )


def validation_record() -> ValidationRecord:
    return ValidationRecord(
        verdict="pass",
        report_sha256="e4" * 32,
        engine="transformers 5.17.0",
        profile="quick",
        evaluation=text_record(),
        metrics=(
            Metric(name="ppl_base", value=11.25),
            Metric(name="ppl_increase_percent", value=1.5, bound=1.875, margin=3.0, verdict="pass", unit="%"),
            Metric(name="kl_nats", value=0.0312, bound=0.0334, margin=0.05, verdict="pass", unit="nats"),
            Metric(name="same_top1_percent", value=93.5, bound=93.25, margin=91.0, verdict="pass", unit="%"),
        ),
    )
