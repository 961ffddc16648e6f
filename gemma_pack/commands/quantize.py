"""`gemma-pack quantize`: a checkpoint and a recipe become a variant."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_pack.commands.options import with_console
from gemma_pack.console import Console, format_bytes, table
from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma_pack.quantization.variant import Variant


DEFAULT_MODEL = "google/gemma-2-9b-it"
PROJECT_FILE = Path("gemma-pack.yaml")


@click.command(
    "quantize",
    epilog="""\b
Examples:
  gemma-pack quantize --recipe w4a16
  gemma-pack quantize demo --recipe w4a16 --calibration builtin \\
      --samples 64 --sequence-length 512""",
)
@click.argument("model", required=False, envvar="GEMMA_PACK_MODEL")
@click.option("-r", "--recipe", multiple=True, required=True, help="A shipped recipe or a YAML file.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Directory to make  [default: <model>-quantized.<recipe>]"
)
@click.option("--revision", help="Branch, tag or commit on the hub  [default: what the hub names now]")
@click.option("--calibration", help="Hub dataset, .txt or .jsonl file, or builtin  [default: the recipe's]")
@click.option("--samples", type=click.IntRange(min=1), help="Calibration windows  [default: the recipe's]")
@click.option("--sequence-length", type=click.IntRange(min=16), help="Tokens a window  [default: the recipe's]")
@click.option("--seed", type=click.IntRange(min=0), help="Which windows are drawn  [default: the recipe's]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto is a GPU where there is one.",
)
@click.option("--offline", is_flag=True, help="Use no network.")
@with_console
def command(
    model: str | None,
    recipe: tuple[str, ...],
    output: Path | None,
    revision: str | None,
    calibration: str | None,
    samples: int | None,
    sequence_length: int | None,
    seed: int | None,
    device: str,
    console: Console,
    *,
    offline: bool,
) -> None:
    """Quantize MODEL by one or more recipes, in one pass over text.

    MODEL is a hub id, a directory, or `demo`. Without it: GEMMA_PACK_MODEL, `model:` in ./gemma-pack.yaml,
    else google/gemma-2-9b-it. An interrupted run goes on where it stopped when the same command is run again.
    """
    from gemma_pack.build import CalibrationChoice, default_stem, is_first_process, quantize_models
    from gemma_pack.recipe import load_recipe

    if not is_first_process():
        console = Console("quiet")
    loaded = {name: load_recipe(name) for name in recipe}
    if output and len(loaded) > 1:
        raise InvalidUsageError("-o names one directory, and there are several recipes", hint="leave out -o")
    model = model or project_model() or DEFAULT_MODEL
    stem = default_stem(model)
    targets = {name: output or Path(f"{stem}-quantized.{chosen.name}") for name, chosen in loaded.items()}
    _require_free(targets)
    choice = CalibrationChoice(calibration, samples, sequence_length, seed)
    recipes = {target: name for name, target in targets.items()}
    results = quantize_models(
        model, recipes, choice, revision=revision, device=device, offline=offline, reporter=console
    )
    rows = [
        [str(v.directory), format_bytes(m.base_size_bytes), format_bytes(m.size_bytes), _outcome(v)]
        for v in results
        if (m := v.record.quantization)
    ]
    data: dict[str, Any] = {
        "variants": [
            {"directory": str(v.directory), "made_now": v.made_now, "record": v.record.model_dump(mode="json")}
            for v in results
        ]
    }
    if not is_first_process():
        return
    console.result(data, table(rows, header=["variant", "bf16", "quantized", ""]))
    console.hint(f"gemma-pack validate {shlex.quote(str(results[-1].directory))}")


def _require_free(targets: Mapping[str, Path]) -> None:
    """Refuse, before gigabytes are fetched, a directory that holds something else or that two recipes would make."""
    from gemma_pack.disk import refuse_existing
    from gemma_pack.record import read_record

    owners: dict[Path, str] = {}
    for name, target in targets.items():
        if owners.setdefault(target, name) != name:
            raise InvalidUsageError(
                f"the recipes {owners[target]} and {name} would both make {target}", hint="give them different names"
            )
        if not target.is_dir() or read_record(target) is None:  # with a record it may be this very variant
            refuse_existing(target)


def _outcome(variant: Variant) -> str:
    if variant.made_now:
        return "made now"
    return (
        "already there, now with this recipe.yaml" if variant.has_new_recipe else "already there, from the same inputs"
    )


def project_model() -> str | None:
    """Return `model:` of ./gemma-pack.yaml, if there is one; other keys are left to other tools."""
    if not os.path.lexists(PROJECT_FILE):
        return None
    from pydantic import BaseModel

    from gemma_pack.yaml_file import parse_yaml, read_text

    class Project(BaseModel):
        model: str | None = None

    hint = f"write `model: {DEFAULT_MODEL}` into it, or name the model on the command line"
    return parse_yaml(Project, read_text(PROJECT_FILE, hint=hint), origin=str(PROJECT_FILE), hint=hint).model
