"""Which preset, which precision: what goes together, what fits, and what is refused in a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gemma_pack.chat.presets import ROOM_BYTES, Weights, choose, measure_weights
from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import InvalidUsageError, MachineError

if TYPE_CHECKING:
    from pathlib import Path

BASE = Weights(method=None, bfloat16_bytes=18_000, small_bytes=6_000, resident_bytes=2_000)
VARIANT = Weights(method="compressed-tensors", bfloat16_bytes=18_000, small_bytes=6_000, resident_bytes=6_000)
BNB = Weights(method="bitsandbytes", bfloat16_bytes=18_000, small_bytes=6_000, resident_bytes=6_000)


@pytest.mark.parametrize(
    ("weights", "spare", "preset", "precision"),
    [
        (BASE, 18_000, "exact", "bfloat16"),
        (BASE, 17_999, "memory", "nf4"),
        (BASE, 5_999, "memory-extreme", "bfloat16"),
        (VARIANT, 18_000, "exact", "bfloat16"),
        (VARIANT, 17_999, "memory", "packed"),
        (BNB, 18_000, "memory", "packed"),
    ],
)
def test_auto_takes_the_first_that_fits(weights: Weights, spare: int, preset: str, precision: str) -> None:
    plan = choose(weights, None, None, "cpu", ROOM_BYTES + spare)
    assert (plan.preset, plan.precision) == (preset, precision)


@pytest.mark.parametrize(("weights", "spare"), [(BASE, 1_999), (VARIANT, 5_999), (BNB, 5_999)])
def test_what_fits_nowhere_is_said(weights: Weights, spare: int) -> None:
    with pytest.raises(MachineError, match=r"even --preset memory\S* needs 1\.50 GB, and cpu has 1\.50 GB free"):
        choose(weights, None, None, "cpu", ROOM_BYTES + spare)


def test_a_system_that_does_not_say_what_is_free_gets_exact() -> None:
    assert choose(BASE, None, None, "cpu", None).preset == "exact"


@pytest.mark.parametrize(
    ("precision", "preset"), [("float32", "exact"), ("bfloat16", "exact"), ("int8", "memory"), ("nf4", "memory")]
)
def test_a_precision_alone_says_the_preset(precision: str, preset: str) -> None:
    plan = choose(BASE, None, precision, "cpu", 0)  # type: ignore[arg-type]
    assert (plan.preset, plan.precision) == (preset, precision)


@pytest.mark.parametrize(
    ("weights", "preset", "precision", "sentence"),
    [
        (BASE, "exact", "nf4", "--preset exact does not compute in nf4"),
        (BASE, "speed", "int8", "--preset speed does not compute in int8"),
        (BASE, "memory", "float32", "--preset memory does not compute in float32"),
        (BASE, "memory-extreme", "float32", "--preset memory-extreme does not compute in float32"),
        (VARIANT, None, "nf4", "--precision nf4 quantizes, and the checkpoint is quantized already"),
        (VARIANT, "memory-extreme", None, "--preset memory-extreme brings bf16 layers in one at a time"),
        (BNB, "exact", None, "--preset exact wants bf16 weights"),
        (BNB, "speed", None, "--preset speed wants bf16 weights"),
    ],
)
def test_what_does_not_go_together_is_refused(
    weights: Weights, preset: str | None, precision: str | None, sentence: str
) -> None:
    with pytest.raises(InvalidUsageError) as refusal:
        choose(weights, preset, precision, "cpu", None)  # type: ignore[arg-type]
    assert refusal.value.message.startswith(sentence)
    assert refusal.value.hint


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3"])
def test_weights_are_measured_from_headers_alone(tiny_checkpoints: object, family: str) -> None:
    directory: Path = tiny_checkpoints(family)  # type: ignore[operator]
    checkpoint = Checkpoint.open(directory)
    weights = measure_weights(checkpoint)
    per_layer = 2 * (128 * (2 + 1 + 1 + 2) * 64 + 3 * 128 * 256)  # q, k, v, o; gate, up, down; bf16
    assert weights.method is None
    assert weights.bfloat16_bytes == checkpoint.size_bytes
    assert weights.bfloat16_bytes - weights.resident_bytes == 3 * per_layer
    assert weights.small_bytes - weights.resident_bytes == pytest.approx(3 * per_layer * 4.127 / 16, abs=1)
