"""Scores of tokens against the textbook, and the checks that come before and after."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from gemma_pack.bfloat16 import attention
from gemma_pack.errors import MachineError, QuantizationError
from gemma_pack.evaluation import distributions, workers
from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.evaluation.likelihood import check_bos, measure_noise, score
from tests.evaluation.conftest import noise
from tests.evaluation.test_distributions import textbook

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Console
    from gemma_pack.evaluation.engines.in_process import Model
    from gemma_pack.texts import Windows


def test_every_token_is_scored_once_and_as_the_model_itself_does(
    trained: Path, make_variant: Callable[..., Path], evaluation_windows: Windows, reporter: Console
) -> None:
    base, variant = load(trained, "base", "cpu"), load(make_variant(noise(0.1)), "variant", "cpu")
    scores = score(base, variant, evaluation_windows.ids[:5], reporter)
    ids = torch.from_numpy(evaluation_windows.ids[:5]).long()
    with torch.inference_mode():
        logits = [model.module(ids).logits[:, :-1].float().flatten(0, 1) for model in (base, variant)]
    expected = textbook(*logits, ids[:, 1:].flatten())
    for ours, theirs in zip(
        (scores.nll_base, scores.nll_variant, scores.kl_nats, scores.delta_p), expected[:4], strict=True
    ):
        assert ours.shape == (5, 63)
        assert ours.ravel() == pytest.approx(theirs.numpy(), abs=1e-4)
    assert (scores.base_top1.ravel() == expected[4].numpy()).all()
    assert (scores.variant_top1.ravel() == expected[5].numpy()).all()


def test_chunks_do_not_change_the_scores(
    trained: Path, evaluation_windows: Windows, reporter: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(trained, "base", "cpu")
    whole = score(model, model, evaluation_windows.ids[:6], reporter)
    monkeypatch.setattr(distributions, "TOKENS_AT_ONCE", 50)
    monkeypatch.setattr(distributions, "CACHED_BYTES", 37 * 2 * 50)
    in_pieces = score(model, model, evaluation_windows.ids[:6], reporter)
    assert in_pieces.nll_base == pytest.approx(whole.nll_base, abs=0.02)  # bf16 products of another shape
    assert in_pieces.nll_base.shape == whole.nll_base.shape


def test_the_noise_floor_is_what_another_batch_size_costs(trained: Path, evaluation_windows: Windows) -> None:
    model = load(trained, "base", "cpu")
    noise = measure_noise(model, evaluation_windows.ids)
    assert (noise.windows, noise.batch) == (16, 1)
    assert 0 <= noise.kl_nats < 0.01
    assert noise.same_top1 > 0.95
    assert abs(noise.ln_ratio) < 0.01
    assert noise.kernel is not None
    assert noise.kernel.attention == "eager"
    assert 0 < noise.kernel.kl_nats < 0.01
    assert noise.kernel.same_top1 > 0.95
    assert model.module.config._attn_implementation == attention("sdpa")  # as it was


def test_gemma_2_has_one_kernel(tiny_checkpoints: Callable[..., Path]) -> None:
    model = load(tiny_checkpoints("gemma2"), "base", "cpu")
    ids = np.random.default_rng(0).integers(10, 500, (4, 20), np.int32)
    assert measure_noise(model, ids).kernel is None


class Crowded:
    """A model whose device has no room for more than so many windows."""

    def __init__(self, model: Model, room: int) -> None:
        self.model, self.room, self.asked = model, room, []

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(ids))
        if len(ids) > self.room:
            raise torch.OutOfMemoryError("no room")
        return self.model.hidden(ids)


def test_out_of_memory_means_fewer_windows_at_once(
    trained: Path, evaluation_windows: Windows, reporter: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MOST_WORKERS", 1)
    model = load(trained, "base", "cpu")
    crowded = Crowded(model, room=5)
    scores = score(crowded, model, evaluation_windows.ids, reporter)  # type: ignore[arg-type]
    assert crowded.asked[:5] == [16, 16, 10, 5, 5]  # of 40 windows, 20, 10 and 5
    expected = score(model, model, evaluation_windows.ids, reporter)
    assert scores.nll_base == pytest.approx(expected.nll_base, abs=0.1)


def test_no_room_for_one_window_exits_12(trained: Path, evaluation_windows: Windows, reporter: Console) -> None:
    crowded = Crowded(load(trained, "base", "cpu"), room=0)
    with pytest.raises(MachineError, match="out of memory with a single window"):
        score(crowded, crowded, evaluation_windows.ids[:2], reporter)  # type: ignore[arg-type]


def test_the_final_soft_cap_is_applied(tiny_checkpoints: Callable[..., Path]) -> None:
    model = load(tiny_checkpoints("gemma2"), "base", "cpu")
    ids = torch.randint(10, 500, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model.module.lm_head.weight.mul_(40)  # far beyond the cap of 30
        ours = model.logits(model.hidden(ids)[0])
        theirs = model.module(ids).logits[0].float()
    assert model.attention == "eager"
    assert float(theirs.abs().max()) > 25
    assert ours.numpy() == pytest.approx(theirs.numpy(), abs=0.3)  # transformers caps in bf16


def test_bos_helps_a_trained_model(trained: Path, evaluation_windows: Windows) -> None:
    check = check_bos(load(trained, "base", "cpu"), evaluation_windows.ids)
    assert 1 < check.with_bos < check.without_bos


def test_a_base_that_is_no_better_with_bos_stops_everything(trained: Path, evaluation_windows: Windows) -> None:
    shifted = evaluation_windows.ids.copy()
    shifted[:, 0], shifted[:, 1] = 300, 2  # as if something stood before <bos>
    with pytest.raises(MachineError, match="the baseline is broken") as caught:
        check_bos(load(trained, "base", "cpu"), shifted)
    assert caught.value.exit_code == 12


@pytest.mark.parametrize("role", ["base", "variant"])
def test_nan_is_a_failure_that_names_model_and_layer(
    trained: Path, tmp_path: Path, evaluation_windows: Windows, reporter: Console, role: str
) -> None:
    shutil.copytree(trained, tmp_path / "broken")
    sound, broken = load(trained, "base", "cpu"), load(tmp_path / "broken", role, "cpu")
    with torch.no_grad():
        broken.module.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    pair = (broken, sound) if role == "base" else (sound, broken)
    with pytest.raises(QuantizationError, match=rf"the {role} computes NaN .* model.layers.1.mlp.up_proj"):
        score(*pair, evaluation_windows.ids[:2], reporter)


def test_no_thread_lays_4_bit_weights_out_anew(
    tiny_checkpoint: Path, tmp_path: Path, reporter: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes 0.50 does so in a first pass where the processor multiplies bf16; two threads at once fail."""
    from bitsandbytes.nn import modules
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, dtype=torch.bfloat16, quantization_config=config
    ).save_pretrained(tmp_path / "nf4")
    base, variant = load(tiny_checkpoint, "base", "cpu"), load(tmp_path / "nf4", "variant", "cpu")
    later: list[object] = []
    convert = modules._convert_weight_packed_for_cpu
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", lambda *its: later.append(its) or convert(*its))
    scores = score(base, variant, np.random.default_rng(0).integers(10, 500, (4, 20), np.int32), reporter)
    assert not later
    assert 0 < scores.kl_nats.mean() < 1
