"""A few steps of refinement, and the passes that they cannot do without, each timed over the same tokens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from gemma_pack.console import Console
from gemma_pack.quantization.journal import Journal
from gemma_pack.quantization.packing import pack
from gemma_pack.quantization.ranks import Ranks
from gemma_pack.quantization.refinement import refine_scales
from gemma_pack.quantization.rounding import round_group
from gemma_pack.quantization.scheme import quantization_scheme
from gemma_pack.recipe import Refinement, load_recipe
from gemma_pack.texts import load_windows

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.recipe import Recipe

SETTINGS = Refinement(steps=20, windows_a_step=2, sequence_length=256, held_out=4)
"""As w4a16 has them, fewer."""


def recipe_and_windows(base: Path) -> tuple[Recipe, torch.Tensor]:
    """Return w4a16 with fewer steps, and its windows: those held out first."""
    recipe = load_recipe("w4a16").model_copy(update={"refinement": SETTINGS})
    windows = load_windows(
        "builtin", "calibration", base, samples=SETTINGS.windows, sequence_length=SETTINGS.sequence_length, seed=0
    )
    return recipe, torch.from_numpy(windows.ids).long()


def refined_seconds(base: Path, work: Path) -> float:
    """Return the time of refinement as `quantize` runs it, after rounding to nearest in the place of GPTQ."""
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.gemma import decoder_linears, decoder_prefix
    from gemma_pack.quantization.decoder import read_tensor

    recipe, windows = recipe_and_windows(base)
    checkpoint, scheme = Checkpoint.open(base), quantization_scheme(recipe)
    journal = Journal(work / "refined", {})
    nearest = recipe.model_copy(update={"algorithm": "nearest"})
    for index, groups in enumerate(decoder_linears(checkpoint.config, decoder_prefix(checkpoint.tensors))):
        for number, group in enumerate(groups):
            weights = [read_tensor(checkpoint, f"{name}.weight") for name in group]
            rounded = round_group(weights, scheme.weights, None, nearest)
            made = [pack(name, linear, scheme) for name, linear in zip(group, rounded, strict=True)]
            journal.save(f"layer-{index:03}-{number}", {k: v for tensors in made for k, v in tensors.items()})
    begin = time.monotonic()
    refine_scales(
        checkpoint, recipe, windows.numpy(),
        device=torch.device("cpu"), ranks=Ranks(), journal=journal, reporter=Console("quiet"),
    )  # fmt: skip
    seconds = time.monotonic() - begin
    journal.close()
    return seconds


def bare_seconds(base: Path) -> float:
    """Return the time of forward passes of two models and backward passes of one, and of nothing else.

    The gradient of the logits is given, so there is no loss to compute; weights of linear layers take gradients.
    """
    from transformers import AutoModelForCausalLM

    _, windows = recipe_and_windows(base)
    begin = time.monotonic()
    first, second = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval() for _ in range(2))
    second.requires_grad_(requires_grad=False)
    for module in second.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            module.requires_grad_(requires_grad=True)
    with torch.no_grad():
        for window in windows[: SETTINGS.held_out].split(1):
            _logits(first, window)
            for _ in range(2):  # held-out windows are judged before and after
                _logits(second, window)
    for batch in windows[SETTINGS.held_out :].split(SETTINGS.windows_a_step):
        with torch.no_grad():
            _logits(first, batch)
        logits = _logits(second, batch)
        logits.backward(torch.ones_like(logits))
    return time.monotonic() - begin


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - a transformers model
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
