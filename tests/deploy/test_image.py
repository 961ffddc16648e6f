"""What a target reads from an image."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.deploy.image import ServedImage
from gemma_pack.deploy.options import MAX_NAME_LENGTH
from gemma_pack.errors import InvalidUsageError
from tests.deploy.conftest import DIGEST, record_of

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    "reference",
    [
        "registry.example.com/team/gemma:1.0",
        "registry.example.com/team/gemma",
        "registry.example.com/team/gemma@sha256:12",
        f"gemma@{DIGEST}",
        f"registry.example.com/team/ge mma@{DIGEST}",
        f"registry.example.com/team/gemma@{DIGEST}\n",
    ],
)
def test_what_is_not_pinned_by_digest_is_refused(served: Callable[..., ServedImage], reference: str) -> None:
    with pytest.raises(InvalidUsageError, match="not pinned by digest"):
        served(reference=reference)


@given(st.from_regex(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+){0,4}(/[a-z0-9]+(?:[._-][a-z0-9]+)*)?", fullmatch=True))
def test_every_repository_gives_a_name_that_kserve_takes(repository: str) -> None:
    image = ServedImage(
        reference=f"localhost:5000/{repository}@{DIGEST}", tag=None, size_bytes=1, record=None, config={}
    )
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", image.name)
    assert len(image.name) <= MAX_NAME_LENGTH


def test_the_name_comes_from_the_repository(served: Callable[..., ServedImage]) -> None:
    assert served().name == "gemma-3-270m-quantized-w4a16"
    assert served().host == "registry.example.com:5000"


def test_weights_are_what_the_record_counted_else_the_whole_image(served: Callable[..., ServedImage]) -> None:
    assert served().weights_bytes == 307_000_000
    assert served(record=None).weights_bytes == 347_000_000


def test_what_vllm_does_not_load_is_refused(served: Callable[..., ServedImage]) -> None:
    config = {**served().config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.raises(InvalidUsageError, match="in bitsandbytes' format, which vLLM dropped") as refusal:
        served(config=config)
    assert refusal.value.hint
    assert "gemma-pack chat" in refusal.value.hint


def test_the_description_says_what_the_base_is(served: Callable[..., ServedImage]) -> None:
    image = served(record=record_of("google/gemma-3-270m", 1, verdict=None, note="a dequantized GGUF"))
    assert image.describe() == [
        f"Weights: {image.reference} (tag 1.0 when this was written)",
        f"Base: google/gemma-3-270m at {'9' * 40}",
        "Note: a dequantized GGUF",
        "Recipe: w4a16 (int4 weights in groups of 128)",
        "Validation: none",
    ]
    assert served(record=None).describe()[-1] == "The image carries no record of its origin."


def test_an_artifact_has_no_file_system(served: Callable[..., ServedImage]) -> None:
    served().require_modelcar()
    with pytest.raises(InvalidUsageError, match="artifact of raw files"):
        served(is_artifact=True).require_modelcar()
