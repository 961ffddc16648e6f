"""Refinement tried on recipes that do not have it: the scales of a variant tuned end to end, activations rounded.

    python bench/refinement_trial.py WORK [--only TRIAL ...] [--windows 6]

Recipes whose activations are quantized too take no `refinement:`; here is what they would gain. A variant of the demo
model is loaded as `validate` loads it. Its weights are then multiplied by what training makes of their scales, rounded
as the format stores them; activations pass their rounding on the way there and are straight-through on the way back.
Loss, optimizer, windows and rate over the steps are those of `w4a16`'s refinement, held-out windows choose the step,
and KL is that of texts which serve for choosing. `nvfp4-global` trains one number for each group of fused layers. The
table goes to stdout and, with date and versions, to bench/results/refinement-trial.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from machine import machine
from quality import EVALUATION_SEED, HERE, VERSIONS, Bench, ours
from safetensors import safe_open

from gemma_pack.console import Console, table
from gemma_pack.evaluation.engines.activations import scheme_of
from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.evaluation.likelihood import score
from gemma_pack.gemma import decoder_linears
from gemma_pack.quantization.divergence import kl_to_base
from gemma_pack.recipe import Refinement, load_recipe
from gemma_pack.texts import load_windows

if TYPE_CHECKING:
    from torch import Tensor

    from gemma_pack.evaluation.engines.activations import ActivationScheme
    from gemma_pack.evaluation.engines.in_process import Model

SETTINGS = load_recipe("w4a16").refinement or Refinement(steps=50)
EVERY = 25
"""Steps between two looks at the held-out windows."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is trained of a recipe's variant, and how fast."""

    name: str
    recipe: str
    rate: float
    whole: bool = False
    """One number for each group of fused layers in the place of every scale."""


RATE = 1e-3
"""The one of `w4a16`."""
TRIALS = (
    Trial("w8a8", "w8a8", RATE),
    Trial("fp8", "fp8", RATE),
    Trial("nvfp4", "nvfp4", RATE),
    Trial("nvfp4-global", "nvfp4", RATE, whole=True),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """KL, in nats a token, before and after; the held-out windows chose `step`."""

    trial: str
    step: int
    held_out_before: float
    held_out_after: float
    texts_before: float
    texts_after: float
    seconds: float


class StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is taken for that of doing nothing."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, scheme: ActivationScheme) -> Tensor:  # noqa: ANN401 - torch's own
        """Return the rounded states."""
        del ctx
        return scheme.round(states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's own
        """Hand the gradient on."""
        del ctx
        return grad_outputs[0], None


class TrialLinear(torch.nn.Module):
    """A dequantized layer whose scales are trained: its weight times stored(scale · exp(change)) / scale."""

    def __init__(self, linear: torch.nn.Linear, scale: Tensor, change: torch.nn.Parameter | None) -> None:
        """Take the layer as `load` made it and its stored scales; `change` where it shares one."""
        super().__init__()
        quantization: Any = linear.quantization_scheme
        self.activations = scheme_of(quantization.input_activations, linear)
        self.weight: Tensor = linear.weight.data
        self.stored, self.start = scale.dtype, scale.float().reshape(len(scale) if scale.ndim else 1, -1)
        self.change = torch.nn.Parameter(torch.zeros_like(self.start)) if change is None else change
        self.whole = change is not None

    def forward(self, states: Tensor) -> Tensor:
        """Return the product of the rounded states and the weight."""
        if self.activations is not None:
            states = StraightThrough.apply(states, self.activations)  # type: ignore[no-untyped-call]
        factor = self.change.exp()
        if not self.whole:
            exact = self.start * factor
            factor = (exact + (exact.to(self.stored).float() - exact).detach()) / self.start
        rows, columns = self.weight.shape
        groups = self.weight.float().view(-1, factor.shape[-1], columns // factor.shape[-1])
        weight = (groups * factor.unsqueeze(-1)).to(self.weight.dtype).float().view(rows, columns)
        return (states.float() @ weight.T).to(states.dtype)  # as fast on every processor, and rounded once


def replace_linears(model: Model, directory: Path, *, whole: bool) -> list[TrialLinear]:
    """Put a `TrialLinear` in the place of each quantized layer."""
    made = []
    with safe_open(next(p for p in directory.glob("*.safetensors") if _holds_scales(p)), "pt") as tensors:
        for groups in decoder_linears(json.loads((directory / "config.json").read_text("utf-8")), "model."):
            for group in groups:
                shared = torch.nn.Parameter(torch.zeros(1, 1)) if whole else None
                for name in group:
                    parent, _, own = name.rpartition(".")
                    owner = model.module.get_submodule(parent)
                    scale = tensors.get_tensor(f"{name}.weight_scale")
                    made.append(TrialLinear(getattr(owner, own), scale, shared))
                    setattr(owner, own, made[-1])
    return made


def _holds_scales(path: Path) -> bool:
    with safe_open(path, "pt") as tensors:
        return any(name.endswith(".weight_scale") for name in tensors.keys())  # noqa: SIM118 - no mapping


def texts_kl(bench: Bench, base: Model, variant: Model) -> float:
    """Return the mean KL over the texts."""
    found = []
    for path in sorted(bench.texts.glob(f"{bench.purpose}-*.txt")):
        ids = load_windows(
            str(path), "evaluation", bench.base, samples=bench.windows, sequence_length=512, seed=EVALUATION_SEED
        ).ids
        found.append(float(score(base, variant, ids, Console("quiet")).kl_nats.mean()))
    return float(np.mean(found))


def states(model: Model, windows: Tensor) -> Tensor:
    """Return the last hidden states of int64 windows, [windows · tokens, width]."""
    return model.hidden(windows).flatten(0, 1)


def run(trial: Trial, bench: Bench, base: Model) -> Outcome:
    """Make the variant, train its scales and measure."""
    contender = ours(trial.recipe, "", 0)
    bench.make([contender])
    directory = bench.target(contender, 1)
    variant = load(directory, "variant", "cpu")
    before = texts_kl(bench, base, variant)
    begin = time.monotonic()
    linears = replace_linears(variant, directory, whole=trial.whole)
    variant.module.requires_grad_(requires_grad=False)
    parameters = list({id(linear.change): linear.change.requires_grad_() for linear in linears}.values())
    ids = load_windows(
        str(bench.calibration), "calibration", bench.base,
        samples=SETTINGS.windows, sequence_length=SETTINGS.sequence_length, seed=1,
    ).ids  # fmt: skip
    windows = torch.from_numpy(ids).long()
    with torch.no_grad():
        wanted = torch.stack([states(base, window[None]) for window in windows])
    head = base.module.lm_head.weight.detach()

    def loss(chosen: Tensor) -> Tensor:
        return kl_to_base(states(variant, windows[chosen]), wanted[chosen].flatten(0, 1), head, None)

    def held_out() -> float:
        with torch.no_grad():
            return float(np.mean([float(loss(torch.tensor([place]))) for place in range(SETTINGS.held_out)]))

    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))
    best_step, best, kept = 0, (first := held_out()), [p.detach().clone() for p in parameters]
    generator = np.random.default_rng(SETTINGS.seed)
    for step in range(SETTINGS.steps):
        warm = min(1.0, (step + 1) / 10)
        for group in optimizer.param_groups:
            group["lr"] = trial.rate * warm * 0.5 * (1 + math.cos(math.pi * step / SETTINGS.steps))
        drawn = generator.choice(np.arange(SETTINGS.held_out, len(windows)), SETTINGS.windows_a_step, replace=False)
        optimizer.zero_grad()
        loss(torch.from_numpy(drawn)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % EVERY == 0 and (now := held_out()) < best:
            best_step, best, kept = step + 1, now, [p.detach().clone() for p in parameters]
    seconds = time.monotonic() - begin
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data.copy_(value)
    return Outcome(trial.name, best_step, first, best, before, texts_kl(bench, base, variant), round(seconds, 1))


def main() -> None:
    """Run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", action="append", default=[], help="trials; the results of others stay as they are")
    parser.add_argument("--windows", type=int, default=6)
    options = parser.parse_args()
    bench = Bench(options.work.absolute(), purpose="choose", windows=options.windows)
    base = load(bench.base, "base", "cpu")
    chosen = [trial for trial in TRIALS if not options.only or trial.name in options.only]
    outcomes = [run(trial, bench, base) for trial in chosen]
    rows = [
        [o.trial, str(o.step), f"{o.held_out_before:.4f}", f"{o.held_out_after:.4f}", f"{o.texts_before:.4f}",
         f"{o.texts_after:.4f}", f"{o.seconds:.0f}"]
        for o in outcomes
    ]  # fmt: skip
    print(table(rows, header=["trial", "step", "held out", "after", "texts", "after", "s"]))
    path = HERE / "results" / "refinement-trial.json"
    before = json.loads(path.read_text("utf-8"))["outcomes"] if path.is_file() else []
    made = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {version: importlib.metadata.version(version) for version in VERSIONS},
        "settings": SETTINGS.model_dump(mode="json"),
        "trials": [asdict(trial) for trial in TRIALS],
        "outcomes": [one for one in before if one["trial"] not in {trial.name for trial in chosen}]
        + [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(made, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
