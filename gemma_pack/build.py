"""How a command or a build composes the stages: each function runs one stage with what the stage before left on disk.

Stages never call one another; this is the one place where the output of one becomes the input of the next.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from gemma_pack.errors import MachineError

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.variant import Variant
    from gemma_pack.recipe import Calibration
    from gemma_pack.texts import Windows


@dataclass(frozen=True, slots=True)
class CalibrationChoice:
    """What a user says about the calibration text; None leaves it to the recipe."""

    dataset: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    seed: int | None = None

    def applied_to(self, calibration: Calibration) -> Calibration:
        """Return the recipe's calibration with what the user said instead."""
        said = {key: value for key, value in asdict(self).items() if value is not None}
        return calibration.model_copy(update=said)


def quantize_model(
    model: str,
    recipe_name: str,
    target: Path,
    choice: CalibrationChoice,
    *,
    revision: str | None = None,
    device: str = "auto",
    offline: bool = False,
    reporter: Reporter,
) -> Variant:
    """Obtain `model`, cut the calibration windows and quantize into `target`, with a model card beside the weights."""
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.quantization.variant import Job, quantize
    from gemma_pack.recipe import load_recipe, recipe_text
    from gemma_pack.reports.card import write_card
    from gemma_pack.sources import obtain
    from gemma_pack.texts import load_windows

    recipe = load_recipe(recipe_name)
    source = obtain(model, revision=revision, output=None, offline=offline, reporter=reporter)
    calibration = choice.applied_to(recipe.calibration) if recipe.calibration else None
    refinement = recipe.refinement

    def windows(samples: int | None = None, sequence_length: int | None = None) -> Windows | None:
        if calibration is None:
            return None
        return load_windows(
            calibration.dataset,
            "calibration",
            source.directory,
            samples=samples or calibration.samples,
            sequence_length=sequence_length or calibration.sequence_length,
            seed=calibration.seed,
            split=calibration.split,
            offline=offline,
            reporter=reporter,
        )

    job = Job(
        base=Checkpoint.open(source.directory),
        source=source.record,
        recipe=recipe,
        recipe_text=recipe_text(recipe_name),
        windows=windows(),
        refinement_windows=windows(refinement.windows, refinement.sequence_length) if refinement else None,
        device=resolve_device(device),
    )
    variant = quantize(job, target, reporter)
    if variant.made_now:
        write_card(target)
    return variant


def resolve_device(device: str) -> str:
    """Return `cuda` or `cpu` for `auto`, and check that a device asked for by name is there.

    Raises:
        MachineError: CUDA was asked for, and there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("no CUDA device is to be had here", hint="leave out --device cuda to use the CPU")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
