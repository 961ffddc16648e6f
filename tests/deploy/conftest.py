"""Images to serve: the demo's variant and the sizes that matter, by their published configs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.deploy.image import ServedImage
from gemma_pack.record import (
    FileDigest,
    QuantizationRecord,
    Record,
    SourceRecord,
    TextRecord,
    UntouchedProof,
    ValidationRecord,
)

if TYPE_CHECKING:
    from collections.abc import Callable

DIGEST = "sha256:" + "5d" * 32
GROUPS_OF_128 = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}}}

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma-3-270m": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 18,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    },
    "gemma-2-9b-it": {
        "model_type": "gemma2",
        "num_hidden_layers": 42,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
    },
    "gemma-2-27b-it": {
        "model_type": "gemma2",
        "num_hidden_layers": 46,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
    },
    "gemma-3-27b-it": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "num_hidden_layers": 62,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 1024,
            "max_position_embeddings": 131072,
        },
    },
}
"""What the configs on the hub say, as far as serving asks."""
WEIGHTS_BYTES = {
    "gemma-3-270m": 307_000_000,
    "gemma-2-9b-it": 6_150_000_000,
    "gemma-2-27b-it": 15_800_000_000,
    "gemma-3-27b-it": 54_860_000_000,
}
"""Three int4 variants in groups of 128, and the 27B in bf16: round figures for tests, not measurements."""


def record_of(model_id: str, size_bytes: int, *, verdict: str | None = "pass", note: str | None = None) -> Record:
    text = TextRecord(spec="builtin", sha256="0" * 64, windows=32, sequence_length=512, seed=0)
    proof = UntouchedProof(changed=("model.layers.0.mlp.up_proj.weight",), untouched=1, sha256="0" * 64)
    return Record(
        source=SourceRecord(
            kind="hub",
            model_id=model_id,
            revision="9" * 40,
            files=(FileDigest(path="config.json", sha256="0" * 64, size_bytes=1),),
            note=note,
        ),
        quantization=QuantizationRecord(
            recipe="w4a16",
            recipe_sha256="0" * 64,
            scheme="int4 weights in groups of 128",
            algorithm="gptq",
            calibration=text,
            device="cpu",
            versions={},
            untouched=proof,
            base_size_bytes=2 * size_bytes,
            size_bytes=size_bytes,
        ),
        validation=ValidationRecord.model_validate(
            {
                "verdict": verdict,
                "report_sha256": "0" * 64,
                "engine": "transformers",
                "profile": "quick",
                "evaluation": text,
                "metrics": (),
            }
        )
        if verdict
        else None,
    )


@pytest.fixture(scope="session")
def served() -> Callable[..., ServedImage]:
    """Return a function that makes the image of one of CONFIGS; keywords replace fields, `record` included."""

    def make(name: str = "gemma-3-270m", **changes: Any) -> ServedImage:
        quantized = {} if name == "gemma-3-27b-it" else {"quantization_config": GROUPS_OF_128}
        fields: dict[str, Any] = {
            "reference": f"registry.example.com:5000/team/{name}-quantized.w4a16@{DIGEST}",
            "tag": "1.0",
            "size_bytes": WEIGHTS_BYTES[name] + 40_000_000,
            "record": record_of(f"google/{name}", WEIGHTS_BYTES[name]),
            "config": {**CONFIGS[name], **quantized},
            "answers_chat": name.endswith("-it"),
        }
        return ServedImage(**{**fields, **changes})

    return make
