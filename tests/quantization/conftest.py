"""Jobs on tiny checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.quantization.variant import Job
from gemma_pack.recipe import parse_recipe
from gemma_pack.sources.directory import check_directory
from gemma_pack.texts import load_windows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Reporter

RECIPE = """\
name: tiny-w4a16
summary: for tests
scheme: W4A16
group_size: 64
algorithm: gptq
calibration: {dataset: builtin, samples: 8, sequence_length: 64, seed: 1}
gate: [{kl_nats: 1}]
"""


@pytest.fixture
def reporter() -> Reporter:
    from gemma_pack.console import Console

    return Console("quiet")


@pytest.fixture
def make_job(reporter: Reporter) -> Callable[..., Job]:
    """Return a function that makes the job of quantizing a directory by a recipe's text."""

    def make(base: Path, recipe_text: str = RECIPE, *, windows: int = 8, seed: int = 1) -> Job:
        recipe = parse_recipe(recipe_text, origin="tiny.yaml")
        return Job(
            base=Checkpoint.open(base),
            source=check_directory(base, reporter),
            recipe=recipe,
            recipe_text=recipe_text,
            windows=load_windows(
                "builtin", "calibration", base, samples=windows, sequence_length=64, seed=seed, reporter=reporter
            )
            if recipe.calibration
            else None,
            device="cpu",
        )

    return make
