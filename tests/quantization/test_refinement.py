from __future__ import annotations

import gc
import math
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

from gemma_pack.checkpoint import file_sha256
from gemma_pack.errors import QuantizationError, TextError
from gemma_pack.quantization import refinement
from gemma_pack.quantization.divergence import kl_to_base
from gemma_pack.quantization.tuned_model import TunedLinear
from gemma_pack.quantization.variant import quantize
from gemma_pack.texts import load_windows
from tests.quantization.conftest import RECIPE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.ranks import Ranks
    from gemma_pack.quantization.variant import Job

REFINING = (
    RECIPE + "refinement: {steps: 60, windows_a_step: 4, sequence_length: 64, learning_rate: 0.002, held_out: 8}\n"
)


@pytest.fixture
def refining_job(
    tiny_checkpoint: Path, make_job: Callable[..., Job], reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> Job:
    monkeypatch.setattr(refinement, "_EVERY", 20)
    job = make_job(tiny_checkpoint, REFINING)
    windows = load_windows(
        "builtin", "calibration", tiny_checkpoint, samples=248, sequence_length=64, seed=1, reporter=reporter
    )
    object.__setattr__(job, "refinement_windows", windows)
    return job


@pytest.mark.parametrize("windows", [2, 8])
def test_a_text_too_short_to_hold_any_out_is_refused_before_anything_is_rounded(
    refining_job: Job, tiny_checkpoint: Path, tmp_path: Path, reporter: Reporter, windows: int
) -> None:
    few = load_windows("builtin", "calibration", tiny_checkpoint, samples=windows, sequence_length=64, seed=1)
    object.__setattr__(refining_job, "refinement_windows", few)
    with pytest.raises(TextError, match=f"fills {windows} windows of 64 tokens, and refinement holds out 8"):
        quantize(refining_job, tmp_path / "variant", reporter)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_loss_and_gradient_are_those_of_automatic_differentiation(soft_cap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 16, generator=generator)
    base = torch.randn(300, 16, generator=generator)
    hidden = (base + 0.1 * torch.randn(300, 16, generator=generator)).requires_grad_()

    def logits(states: torch.Tensor) -> torch.Tensor:
        found = states @ head.T
        return found if soft_cap is None else soft_cap * torch.tanh(found / soft_cap)

    p, q = logits(base).log_softmax(-1), logits(hidden).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    expected.backward()
    exact = hidden.grad.clone()
    hidden.grad = None
    found = kl_to_base(hidden, base, head, soft_cap)
    found.backward()
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-4)
    assert torch.allclose(hidden.grad, exact, rtol=1e-4, atol=1e-7)


def test_a_base_against_itself_has_no_loss_and_no_gradient() -> None:
    hidden = torch.randn(10, 16).to(torch.bfloat16).requires_grad_()
    loss = kl_to_base(hidden, hidden.detach(), torch.randn(40, 16).to(torch.bfloat16), None)
    loss.backward()
    assert loss.item() == 0
    assert float(hidden.grad.abs().max()) == 0


def test_a_tuned_layer_has_the_gradient_of_its_product() -> None:
    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    scale = torch.rand(6, 2).to(torch.bfloat16) + 0.5
    layer = TunedLinear(codes, scale, torch.device("cpu"))
    inputs = torch.randn(3, 5, 64).to(torch.bfloat16).requires_grad_()
    upstream = torch.randn(3, 5, 6).to(torch.bfloat16)
    layer(inputs).backward(upstream)

    own = scale.float().clone().requires_grad_()
    plain = inputs.detach().float().requires_grad_()
    weight = (codes.float().view(6, 2, 32) * own[..., None]).view(6, 64)
    (plain @ weight.T).backward(upstream.float())
    assert torch.allclose(layer.log_change.grad, own.grad * scale.float(), rtol=0.05, atol=0.05 * float(own.grad.max()))
    assert torch.allclose(inputs.grad.float(), plain.grad, rtol=0.05, atol=0.05 * float(plain.grad.max()))
    assert torch.equal(layer.scale().detach(), scale)


def test_refinement_lowers_the_divergence_and_changes_nothing_but_scales(
    tiny_checkpoint: Path, make_job: Callable[..., Job], refining_job: Job, tmp_path: Path, reporter: Reporter
) -> None:
    from gemma_pack.checkpoint import Checkpoint

    plain = quantize(make_job(tiny_checkpoint), tmp_path / "plain", reporter)
    refined = quantize(refining_job, tmp_path / "refined", reporter)
    told = refined.record.quantization.refinement
    assert told.held_out_kl_after_nats < 0.97 * told.held_out_kl_before_nats
    before, after = Checkpoint.open(plain.directory), Checkpoint.open(refined.directory)
    assert set(before.tensors) == set(after.tensors)
    changed = {name for name in before.tensors if before.tensors[name].read() != after.tensors[name].read()}
    assert changed
    assert all(name.endswith(".weight_scale") for name in changed)


def test_an_interrupted_refinement_goes_on_and_ends_with_the_same_bytes(
    refining_job: Job, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(refining_job, tmp_path / "whole", reporter)
    steps: list[int] = []
    original = refinement._Tuning.take

    def interrupted(self: refinement._Tuning, loss: torch.Tensor, ranks: Ranks) -> None:
        if len(steps) == 50:
            raise KeyboardInterrupt
        steps.append(1)
        original(self, loss, ranks)

    monkeypatch.setattr(refinement._Tuning, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(refining_job, tmp_path / "variant", reporter)
    steps.clear()
    resumed = quantize(refining_job, tmp_path / "variant", reporter)
    assert len(steps) == 60 - 40  # the last state was kept at step 40
    for path in whole.directory.iterdir():
        assert file_sha256(path) == file_sha256(resumed.directory / path.name)


@pytest.mark.parametrize(("kind", "fast"), [("cuda", False), ("cpu", True)])
def test_a_gpu_attends_by_kernels_that_repeat_themselves(kind: str, fast: bool) -> None:
    backends = torch.backends.cuda
    with refinement.repeatable_attention(torch.device(kind)):
        assert (backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled()) == (fast, fast)
        assert backends.math_sdp_enabled()


def test_layers_that_stay_in_host_memory_are_tuned_to_the_same_bytes(
    refining_job: Job, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(refining_job, tmp_path / "whole", reporter)
    monkeypatch.setattr(refinement, "must_stream", lambda *_: True)
    layers: list[bool] = []
    original = refinement.replace_rounded

    def replaced(model: Any, *others: Any, **settings: Any) -> dict[str, TunedLinear]:
        layers.extend(parameter.is_meta for parameter in model.get_decoder().layers.parameters())
        in_host_memory = [
            weakref.ref(tensor)
            for module in model.get_decoder().layers.modules()
            if getattr(getattr(module, "_hf_hook", None), "weights_map", None)
            for tensor in module._hf_hook.weights_map.dataset.values()
            if tensor.dim() == 2
        ]
        assert in_host_memory
        gc.disable()
        try:
            made = original(model, *others, **settings)
            assert not sum(kept() is not None for kept in in_host_memory), "the codes take the weights' place"
        finally:
            gc.enable()
        return made

    monkeypatch.setattr(refinement, "replace_rounded", replaced)
    streamed = quantize(refining_job, tmp_path / "streamed", reporter)
    assert layers
    assert all(layers), "what computes keeps no weight of a layer"
    for path in whole.directory.iterdir():
        assert file_sha256(path) == file_sha256(streamed.directory / path.name)


def test_a_rate_that_makes_it_worse_keeps_the_scales_that_it_began_with(
    refining_job: Job, tmp_path: Path, reporter: Reporter
) -> None:
    wild = refining_job.recipe.refinement.model_copy(update={"learning_rate": 0.1, "steps": 20})
    object.__setattr__(refining_job, "recipe", refining_job.recipe.model_copy(update={"refinement": wild}))

    class Flipped(refinement._Tuning):
        def take(self, loss: torch.Tensor, ranks: Ranks) -> None:
            super().take(-20 * loss, ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement, "_Tuning", Flipped)
        variant = quantize(refining_job, tmp_path / "variant", reporter)
    told = variant.record.quantization.refinement
    assert told.steps == 0
    assert told.held_out_kl_after_nats == told.held_out_kl_before_nats


def test_a_loss_that_is_not_finite_stops_the_run(refining_job: Job, tmp_path: Path, reporter: Reporter) -> None:
    class Broken(refinement._Tuning):
        def take(self, loss: torch.Tensor, ranks: Ranks) -> None:
            super().take(loss * float("nan"), ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement, "_Tuning", Broken)
        with pytest.raises(QuantizationError, match="diverged"):
            quantize(refining_job, tmp_path / "variant", reporter)
    assert not (tmp_path / "variant").exists()
