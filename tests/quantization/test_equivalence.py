"""Smoothing changes nothing before rounding, in any family; what would change the model stops the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import QuantizationError
from gemma_pack.quantization import calibrated, transforms
from gemma_pack.quantization.equivalence import MAX_KL_NATS
from gemma_pack.quantization.variant import quantize

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.variant import Job
    from tests.tiny import Family

SMOOTHED = """\
name: tiny-w8a8
summary: for tests
scheme: W8A8
observer: memoryless_minmax
algorithm: nearest
smoothing: {strength: 0.75}
calibration: {dataset: builtin, samples: 8, sequence_length: 64, seed: 1}
gate: [{kl_nats: 1}]
"""


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma4_text", "gemma4_unified"])
def test_smoothing_is_proved_and_touches_two_norms_a_layer(
    tiny_checkpoints: Callable[[Family], Path],
    make_job: Callable[..., Job],
    tmp_path: Path,
    reporter: Reporter,
    family: Family,
) -> None:
    job = make_job(tiny_checkpoints(family), SMOOTHED)
    variant = quantize(job, tmp_path / "variant", reporter)
    told = variant.record.quantization
    assert abs(told.smoothing.kl_nats) < MAX_KL_NATS
    norms = [name for name in told.untouched.changed if "norm" in name]
    assert len(norms) == 3 * 2
    assert {name.split(".")[-2] for name in norms} == {"input_layernorm", "pre_feedforward_layernorm"}
    made = Checkpoint.open(variant.directory)
    assert all(made.tensors[name].read() != job.base.tensors[name].read() for name in norms)


def test_a_wrong_pair_of_norm_and_linears_stops_the_run(
    tiny_checkpoint: Path,
    make_job: Callable[..., Job],
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """llm-compressor takes the norm behind attention for the one before gate and up."""
    wrong = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}
    monkeypatch.setattr(transforms, "NORM_BEFORE", wrong)
    with pytest.raises(QuantizationError, match="smoothing changed what layer 0 computes"):
        quantize(make_job(tiny_checkpoint, SMOOTHED), tmp_path / "variant", reporter)
    assert not (tmp_path / "variant").exists()


def test_a_gain_of_one_plus_weight_is_wrong_for_gemma_4_and_stops_the_run(
    tiny_checkpoints: Callable[[Family], Path],
    make_job: Callable[..., Job],
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrated, "norm_offset", lambda _config: 1)
    with pytest.raises(QuantizationError, match="smoothing changed what layer 0 computes"):
        quantize(make_job(tiny_checkpoints("gemma4_text"), SMOOTHED), tmp_path / "variant", reporter)
