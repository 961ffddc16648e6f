"""`gemma-pack plan`: what a variant will be and take, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import registry_options, with_console

if TYPE_CHECKING:
    from gemma_pack.console import Console
    from gemma_pack.planning import Plan


@click.command(
    "plan",
    epilog="""\b
Examples:
  gemma-pack plan google/gemma-2-9b-it --recipe w4a16
  gemma-pack plan demo --recipe w4a16 \\
      --push registry.example.com/models/gemma-3-270m --format json""",
)
@click.argument("model", envvar="GEMMA_PACK_MODEL")
@click.option("-r", "--recipe", required=True, multiple=True, help="A shipped recipe or a YAML file.")
@click.option("--push", metavar="REF", help="Ask the registry of REF what it has and what it refuses.")
@click.option("--revision", help="Branch, tag or commit on the hub  [default: what the hub names now]")
@click.option("--samples", type=click.IntRange(min=1), help="Calibration windows  [default: the recipe's]")
@click.option("--sequence-length", type=click.IntRange(min=16), help="Tokens a window  [default: the recipe's]")
@click.option("--offline", is_flag=True, help="Ask no hub: only what this machine has.")
@registry_options
@with_console
def command(
    model: str,
    recipe: tuple[str, ...],
    push: str | None,
    revision: str | None,
    samples: int | None,
    sequence_length: int | None,
    console: Console,
    *,
    offline: bool,
    plain_http: bool,
    ca_file: Path | None,
) -> None:
    """Say what quantizing MODEL will take, from headers alone.

    Reads no weights and needs no GPU: bytes of the variant and of its image, peak memory and disk, layers, what a
    registry lacks and which of its limits would break, what serving takes.

    \b
    Exit codes: 0; 12 if this machine cannot quantize it; 1 if the registry
    would refuse it.
    """
    from dataclasses import asdict

    from gemma_pack.build import CalibrationChoice
    from gemma_pack.errors import InvalidUsageError, MachineError, RegistryError
    from gemma_pack.planning import make_plan
    from gemma_pack.recipe import load_recipe
    from gemma_pack.sources.outline import outline

    if len(recipe) > 1:
        raise InvalidUsageError(
            f"a plan is of one recipe, and here are {', '.join(recipe)}", hint="run gemma-pack plan once for each"
        )
    loaded = load_recipe(recipe[0])
    choice = CalibrationChoice(samples=samples, sequence_length=sequence_length)
    calibration = choice.applied_to(loaded.calibration) if loaded.calibration else None
    found = outline(model, revision=revision, offline=offline)
    plan = make_plan(
        found, loaded, calibration, directory=Path.cwd(), push=push, plain_http=plain_http, ca_file=ca_file
    )
    console.result(asdict(plan), _text(plan))
    broken = [finding for finding in plan.findings if finding.state == "broken"]
    machine = [finding.subject for finding in broken if finding.subject in ("memory", "disk")]
    if machine:
        raise MachineError(f"this machine cannot: too little {' and '.join(machine)}", hint=broken[0].remedy)
    if broken:
        raise RegistryError(broken[0].text, hint=broken[0].remedy)


def _text(plan: Plan) -> str:
    from gemma_pack.commands.doctor import finding_lines
    from gemma_pack.console import format_bytes, table

    share = f"{100 * plan.variant_bytes / plan.base_bytes:.1f} %"
    rows = [
        ["base", format_bytes(plan.base_bytes), f"{plan.parameters / 1e9:.2f} billion parameters in bf16"],
        ["variant", format_bytes(plan.variant_bytes), f"{share} of the base"],
        ["to fetch first", format_bytes(plan.fetch_bytes), ""],
        ["image", format_bytes(plan.image_bytes), f"{len(plan.layers)} layers"],
    ]
    if plan.missing_bytes is not None:
        rows.append(["to push", format_bytes(plan.missing_bytes), "what the registry lacks"])
    rows += [
        ["memory to quantize", format_bytes(plan.memory_bytes), "at most, on the CPU"],
        ["disk to quantize", format_bytes(plan.disk_bytes), ""],
        ["disk of a node", format_bytes(plan.node_disk_bytes), "pulled and unpacked"],
        ["KV cache a request", format_bytes(plan.kv_cache_bytes), f"of {plan.max_model_len} tokens"],
        ["GPU memory to serve", format_bytes(plan.serving_gpu_bytes), "one such request"],
    ]
    there = {True: "there", False: "", None: ""}
    layers = [[layer.title, format_bytes(layer.size_bytes), there[layer.in_registry]] for layer in plan.layers]
    lines = [
        table(rows, header=[plan.recipe, plan.model_id.rpartition("/")[2], ""]),
        "",
        table(layers, header=["layer", "size", "registry" if plan.missing_bytes is not None else ""]),
        "",
    ]
    return "\n".join([*lines, *finding_lines(plan.findings)])
