"""Refinement: the group scales of a rounded model, tuned end to end on what the base model says.

GPTQ chooses codes layer by layer. Here the codes stay as they are and the scales alone are trained so that the whole
model's next-token distribution comes close to the base's again: scale = s₀ · exp(d), Adam on d, loss = mean
KL(base || quantized) over the full vocabulary. Size and format do not change. Prior art: mlx-lm's DWQ (its pull request
129) and the end-to-end phase of EfficientQAT (arXiv 2407.11062).

Some windows are held out; the scales that did best on them are kept, so more steps never end worse than fewer.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemma_pack.errors import QuantizationError
from gemma_pack.gemma import text_config
from gemma_pack.quantization.divergence import kl_to_base
from gemma_pack.quantization.scheme import quantization_scheme
from gemma_pack.quantization.tuned_model import load_untuned, must_stream, replace_rounded

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Reporter
    from gemma_pack.quantization.journal import Journal
    from gemma_pack.quantization.ranks import Ranks
    from gemma_pack.quantization.tuned_model import TunedLinear
    from gemma_pack.recipe import Recipe, Refinement

_EVERY = 25
"""Steps between two looks at the held-out windows, and between two journal entries."""


@dataclass(frozen=True, slots=True)
class Refined:
    """What tuning did to the held-out windows."""

    step: int
    """The step whose scales were kept."""
    kl_before_nats: float
    kl_after_nats: float


def refine_scales(
    checkpoint: Checkpoint,
    recipe: Recipe,
    ids: np.ndarray[Any, np.dtype[np.int32]],
    *,
    device: torch.device,
    ranks: Ranks,
    journal: Journal,
    reporter: Reporter,
) -> Refined:
    """Tune the scales of the rounded layers in the journal, and leave them there as its entry `refined`.

    Args:
        checkpoint: the bf16 base.
        recipe: its `refinement` says how long and how fast.
        ids: int32 [windows, tokens]; the first `held_out` windows only judge.
        device: where the model runs.
        ranks: the processes that share the windows of a step.
        journal: the finished layers; takes the state of the tuning too, so that it can be interrupted.
        reporter: shows progress with the falling KL.

    Raises:
        QuantizationError: the loss is not finite.
    """
    settings = recipe.refinement
    if settings is None:
        raise ValueError("the recipe has no refinement")
    if (done := journal.load("refined-result")) is not None:
        step, before, after = done["result"].tolist()
        return Refined(int(step), before, after)
    streamed = must_stream(checkpoint, recipe, device)
    model = load_untuned(checkpoint, device, streamed=streamed)
    windows = torch.from_numpy(ids).long()
    with repeatable_attention(device):
        loss = _Loss(model, checkpoint, windows, device, ranks)
    modules = replace_rounded(model, journal, quantization_scheme(recipe), device, streamed=streamed)
    tuning = _Tuning(modules, settings)
    held_out = torch.arange(settings.held_out)
    order = settings.held_out + _order(len(windows) - settings.held_out, settings)
    with repeatable_attention(device), reporter.progress("refine scales", settings.steps) as task:
        if (state := journal.load("refining")) is not None:
            tuning.restore(state)
        else:
            tuning.judge(loss.mean(held_out), 0)
        task.advance(tuning.step)
        while tuning.step < settings.steps:
            begin = tuning.step * settings.windows_a_step
            tuning.take(loss.share(order[begin : begin + settings.windows_a_step]), ranks)
            task.advance()
            if tuning.step % _EVERY == 0 or tuning.step == settings.steps:
                tuning.judge(loss.mean(held_out), tuning.step)
                task.note(f"KL {tuning.first:.4f} → {tuning.best:.4f}")
                if ranks.is_first:
                    journal.save("refining", tuning.state())
    result = Refined(tuning.best_step, tuning.first, tuning.best)
    if ranks.is_first:
        journal.save("refined", {f"{name}.weight_scale": scale for name, scale in tuning.kept.items()})
        numbers = torch.tensor([result.step, result.kl_before_nats, result.kl_after_nats], dtype=torch.float64)
        journal.save("refined-result", {"result": numbers})
    ranks.wait()
    return result


def repeatable_attention(device: torch.device) -> AbstractContextManager[None]:
    """Let torch's SDPA compute the same bits each time.

    On a GPU the way back of its flash and memory-efficient kernels adds up in the order in which blocks finish
    (`aten/src/ATen/native/transformers/cuda/attention_backward.cu`); its plain one multiplies matrices.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


class _Loss:
    """Mean KL(base || tuned) of windows, in nats a token."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers has no type for what each family returns
        checkpoint: Checkpoint,
        windows: Tensor,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        """Run the base, which `model` still is, over all windows once; int64 [windows, tokens]."""
        self.model, self.windows, self.device, self.ranks = model, windows, device, ranks
        self.head = model.get_output_embeddings().weight
        self.soft_cap: float | None = text_config(checkpoint.config).get("final_logit_softcapping")
        with torch.no_grad():
            self.base = torch.stack([self._states(window[None]).cpu() for window in windows])

    def of(self, chosen: Tensor) -> Tensor:
        """Return the loss of the windows with these indices, differentiable."""
        base = self.base[chosen].flatten(0, 1).to(self.device)
        return kl_to_base(self._states(self.windows[chosen]), base, self.head, self.soft_cap)

    def share(self, chosen: Tensor) -> Tensor:
        """Return this process's part of the loss of windows: the parts of all processes add up to `of` all of them."""
        mine = self.ranks.share(chosen)
        return self.of(mine) * (len(mine) / len(chosen)) if len(mine) else torch.zeros((), device=self.device)

    @torch.no_grad()
    def mean(self, chosen: Tensor) -> float:
        """Return the loss of windows, one after the other and over all processes."""
        losses = [self.of(index[None]) for index in self.ranks.share(chosen)]
        total = torch.stack(losses).double().sum() if losses else torch.zeros((), dtype=torch.float64)
        self.ranks.add(total := total.to(self.device))
        return float(total) / len(chosen)

    def _states(self, windows: Tensor) -> Tensor:
        """Return the hidden states after the final norm, [windows · tokens, width]."""
        states: Tensor = self.model.get_decoder()(input_ids=windows.to(self.device), use_cache=False).last_hidden_state
        return states.flatten(0, 1)


class _Tuning:
    """Adam on the logarithms of the scales, and the best scales so far."""

    def __init__(self, modules: dict[str, TunedLinear], settings: Refinement) -> None:
        self.modules, self.settings = modules, settings
        self.optimizer = torch.optim.Adam([module.log_change for module in modules.values()], betas=(0.9, 0.95))
        self.step = self.best_step = 0
        self.first = self.best = math.inf
        self.kept: dict[str, Tensor] = {}

    def take(self, loss: Tensor, ranks: Ranks) -> None:
        """Take one step down the gradient of the sum of all processes' `loss`."""
        if not torch.isfinite(loss):
            raise QuantizationError("refinement diverged", hint="lower refinement.learning_rate in the recipe")
        rate = self.settings.learning_rate * _rate(self.step, self.settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        if ranks.size > 1:
            for module in self.modules.values():
                change = module.log_change
                change.grad = torch.zeros_like(change) if change.grad is None else change.grad
                ranks.add(change.grad)
        self.optimizer.step()
        self.step += 1

    def judge(self, held_out_kl: float, step: int) -> None:
        """Keep the scales if they are the best so far."""
        self.first = held_out_kl if step == 0 else self.first
        if held_out_kl < self.best:
            self.best, self.best_step = held_out_kl, step
            self.kept = {name: module.scale().detach().cpu().clone() for name, module in self.modules.items()}

    def state(self) -> dict[str, Tensor]:
        """Return all that `restore` needs, as tensors."""
        numbers = torch.tensor([self.step, self.best_step, self.first, self.best], dtype=torch.float64)
        state = {"numbers": numbers}
        for name, module in self.modules.items():
            moments = self.optimizer.state[module.log_change]
            state |= {
                f"change.{name}": module.log_change.detach().cpu(),
                f"kept.{name}": self.kept[name],
                f"mean.{name}": moments["exp_avg"].cpu(),
                f"square.{name}": moments["exp_avg_sq"].cpu(),
            }
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        step, best_step, self.first, self.best = state["numbers"].tolist()
        self.step, self.best_step = int(step), int(best_step)
        for name, module in self.modules.items():
            parameter = module.log_change
            parameter.data.copy_(state[f"change.{name}"])
            self.kept[name] = state[f"kept.{name}"]
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": state[f"mean.{name}"].to(parameter.device),
                "exp_avg_sq": state[f"square.{name}"].to(parameter.device),
            }


def _order(windows: int, settings: Refinement) -> Tensor:
    """Return which window each draw takes: all of them in a shuffled order, then all again in another."""
    generator = np.random.default_rng(settings.seed)
    draws = settings.steps * settings.windows_a_step
    rounds = math.ceil(draws / windows)
    return torch.from_numpy(np.concatenate([generator.permutation(windows) for _ in range(rounds)])[:draws])


def _rate(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: a short linear warm-up, then a cosine to zero."""
    warm_up = min(10, steps // 4 + 1)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
