"""`gemma-pack build`: all stages for each recipe of a build file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_pack.commands.options import signing_option, with_console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_pack.console import Console
    from gemma_pack.matrix import BuiltVariant


@click.command(
    "build",
    epilog="""\b
Examples:
  gemma-pack build examples/demo.yaml
  gemma-pack build examples/demo.yaml --push registry.example.com/models/gemma-3-270m""",
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--push", metavar="REGISTRY/NAME", help="Push there, pull back and compare.")
@click.option("--plain-http", is_flag=True, help="Speak HTTP to a registry that is not on this machine.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
@click.option("--offline", is_flag=True, help="Fetch no model and no text from the hub.")
@signing_option
@with_console
def command(
    file: Path,
    push: str | None,
    device: str,
    sign_key: Path | None,
    console: Console,
    *,
    plain_http: bool,
    offline: bool,
) -> None:
    """Run all stages for each recipe that FILE names.

    Each variant is quantized, validated, packaged and, where asked, pushed, with its report, bill of materials and
    provenance attached. What an earlier run finished is not done again. A variant that fails its gate does not stop
    the others; the exit code is then that of the gate: 10 failed, 11 undecided.
    """
    from gemma_pack.commands.validate import raise_verdict
    from gemma_pack.matrix import build_variant, load_build_file
    from gemma_pack.oci.signing import load_signing_key

    network: dict[str, Any] = {"offline": offline, "plain_http": plain_http}
    key = load_signing_key(sign_key) if sign_key else None
    plan = load_build_file(file)
    if push:
        plan = plan.model_copy(update={"push": push})
    built = []
    for recipe in plan.recipes:
        console.status(f"── {recipe} of {plan.model}")
        built.append(build_variant(plan, recipe, device=device, **network, key=key, reporter=console))
    console.result({"variants": [variant.model_dump(mode="json") for variant in built]}, _table(built))
    last = built[-1]
    console.hint(
        f"gemma-pack deploy {last.pinned} --target kserve"
        if last.pinned
        else f"gemma-pack push {last.layout} REGISTRY/NAME:TAG"
    )
    for variant in sorted(built, key=lambda one: ("fail", "undecided", "pass").index(one.report.verdict)):
        raise_verdict(variant.report, variant.directory.with_name(f"{variant.directory.name}.report"))


def _table(built: Sequence[BuiltVariant]) -> str:
    from gemma_pack.console import format_bytes, table
    from gemma_pack.reports.wording import VERDICT_WORDS

    blocks = []
    for variant in built:
        report = variant.report
        likelihood, divergence = report.likelihood, report.divergence
        rows = [
            ["size", format_bytes(variant.base_size_bytes), format_bytes(variant.size_bytes)],
            ["perplexity", f"{likelihood.ppl_base:.2f}", f"{likelihood.ppl_variant:.2f}"],
            ["KL(base‖variant)", "", f"{divergence.kl_nats.value:.4f} nats"],
            ["same first choice", "", f"{100 * divergence.same_top1.value:.1f} %"],
            ["verdict", "", VERDICT_WORDS[report.verdict]],
        ]
        name = variant.pinned or f"{variant.layout}@{variant.digest}"
        blocks.append(f"{table(rows, header=[variant.recipe, 'bf16', 'variant'])}\n\n{name}")
    return "\n\n".join(blocks)
