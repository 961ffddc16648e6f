"""`gemma-pack build`: all stages for each recipe of each model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_pack.commands.options import registry_options, signing_option, with_console

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gemma_pack.console import Console
    from gemma_pack.outcome import VariantOutcome


@click.command(
    "build",
    epilog="""\b
Examples:
  gemma-pack build examples/demo.yaml
  gemma-pack build examples/demo.yaml \\
      --push registry.example.com/models/gemma-3-270m
  gemma-pack build google/gemma-2-9b-it --recipe w4a16 \\
      --recipe fp8-dynamic -o built
  gemma-pack build matrix.yaml --engine ray""",
)
@click.argument("targets", nargs=-1, required=True, metavar="FILE.yaml|MODEL...")
@click.option("-r", "--recipe", multiple=True, help="A shipped recipe or a YAML file; may be given several times.")
@click.option("-o", "--output", help="Directory for all that is made  [default: the file's, else here]")
@click.option("--revision", help="Branch, tag or commit of the model  [default: what the hub names now]")
@click.option("--calibration", help="Hub dataset, .txt or .jsonl file, or builtin  [default: the recipe's]")
@click.option("--samples", type=click.IntRange(min=1), help="Calibration windows  [default: the recipe's]")
@click.option("--sequence-length", type=click.IntRange(min=16), help="Tokens a window  [default: the recipe's]")
@click.option(
    "--profile", type=click.Choice(["smoke", "quick", "full"]), help="How each is validated  [default: quick]"
)
@click.option("--extend", is_flag=True, default=None, help="Take more windows, once, where a verdict is undecided.")
@click.option("--text", help="Evaluation text, as for validate  [default: builtin]")
@click.option(
    "--layout", type=click.Choice(["modelcar", "artifact", "both"]), help="As what to pack  [default: modelcar]"
)
@click.option("--push", metavar="REGISTRY/NAME", help="Push what has passed, pull it back and compare.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="This machine, or the Ray cluster at RAY_ADDRESS, a worker a variant.",
)
@click.option("--offline", is_flag=True, help="Fetch no model and no text from the hub.")
@signing_option
@registry_options
@with_console
def command(
    targets: tuple[str, ...],
    device: str,
    engine: str,
    sign_key: Path | None,
    console: Console,
    *,
    offline: bool,
    plain_http: bool,
    ca_file: Path | None,
    **said: Any,  # noqa: ANN401 - the options that stand for what a build file says
) -> None:
    """Run all stages for each recipe of each model.

    FILE says what to build; options replace what it says. Or name models, and recipes with --recipe. Each variant is
    quantized, validated, packaged and, where asked and when it has passed, pushed, with its report, bill of materials
    and provenance attached. What an earlier run finished is not done again. A variant that fails its gate, or whose
    stage fails, does not stop the others. Ends with a table, and with a page over all reports, index.html.

    On a Ray cluster each variant is a task for a worker with the memory, and the GPU, that it takes. The directory of
    the build must be one that all workers have, such as a network file system; they find models and texts by the
    same paths and names. A variant whose worker is lost is run again and goes on where it was. Pushing stays here.

    \b
    Exit codes: 0 all passed, 10 a gate failed, 11 one is undecided; where a
    stage failed, that of its error.
    """
    from gemma_pack.build_file import read_plan
    from gemma_pack.disk import require_makeable
    from gemma_pack.matrix import Means, require_stages, wanted_variants
    from gemma_pack.oci.signing import load_signing_key
    from gemma_pack.publishing import Registry, publish, require_registries
    from gemma_pack.reports.index_page import INDEX_NAME, write_index

    key = load_signing_key(sign_key) if sign_key else None
    registry = Registry(plain_http=plain_http, ca_file=ca_file, key=key)
    plan = read_plan(targets, _as_fields(said))
    wanted = wanted_variants(plan)
    require_stages(plan)
    for one in wanted:
        require_makeable(one.directory)
    require_registries(wanted, registry)
    index = Path(plan.output) / INDEX_NAME
    outcomes: dict[Path, VariantOutcome] = {}
    for outcome in _engine(engine)(plan, wanted, Means(device=device, offline=offline), console):
        repository = next(one.repository for one in wanted if one.directory == outcome.directory)
        done = publish(outcome, repository, registry, console) if repository else outcome
        outcomes[done.directory] = done
        in_order = tuple(outcomes[one.directory] for one in wanted if one.directory in outcomes)
        write_index(index, in_order)
        if done.failure and len(wanted) > 1:
            console.warn(f"{done.recipe} of {done.model}: {done.failure.message}")
    console.result(
        {"variants": [one.model_dump(mode="json") for one in in_order], "index": str(index)},
        _text(in_order, index),
    )
    _say_next(in_order, console)
    _raise_worst(in_order, index)


def _as_fields(said: dict[str, Any]) -> dict[str, Any]:
    """Return the options as the fields of a build file."""
    return {
        "recipes": said["recipe"],
        "output": said["output"],
        "revision": said["revision"],
        "calibration": {
            "text": said["calibration"], "samples": said["samples"], "sequence_length": said["sequence_length"],
        },
        "validation": {"profile": said["profile"], "text": said["text"], "extend": said["extend"]},
        "package": {"layout": said["layout"]},
        "push": said["push"],
    }  # fmt: skip


def _engine(name: str) -> Any:  # noqa: ANN401 - a function of (BuildFile, wanted, Means, Console)
    if name == "ray":
        from gemma_pack.cluster import build_on_cluster

        return build_on_cluster
    from gemma_pack.matrix import build_here

    return build_here


def _say_next(outcomes: Sequence[VariantOutcome], console: Console) -> None:
    images = [image for outcome in outcomes if outcome.word != "error" for image in outcome.images]
    if pinned := [image.pinned for image in images if image.pinned and image.kind == "modelcar"]:
        console.hint(f"gemma-pack deploy {pinned[-1]} --target kserve")
    elif images and not any(image.pinned for image in images):
        console.hint(f"gemma-pack push {shlex.quote(str(images[-1].layout))} REGISTRY/NAME:TAG")


def _raise_worst(outcomes: tuple[VariantOutcome, ...], index: Path) -> None:
    from gemma_pack.commands.validate import raise_verdict
    from gemma_pack.errors import GemmaPackError
    from gemma_pack.outcome import worst
    from gemma_pack.report import report_directory

    outcome = worst(outcomes)
    bad = sum(one.exit_code != 0 for one in outcomes)
    if outcome.failure:
        which = f"{outcome.recipe} of {outcome.model}: " if len(outcomes) > 1 else ""
        error = GemmaPackError(f"{which}{outcome.failure.message}", hint=outcome.failure.hint)
        error.exit_code = outcome.failure.exit_code
        if bad > 1:
            error.hint = f"{bad} of {len(outcomes)} variants are not as they should be: see {index}"
        raise error
    if outcome.report:
        raise_verdict(outcome.report, report_directory(outcome.directory))


def _text(outcomes: Sequence[VariantOutcome], index: Path) -> str:
    body = _block(outcomes[0]) if len(outcomes) == 1 and outcomes[0].report else _matrix(outcomes)
    names = [image.name for outcome in outcomes for image in outcome.images]
    return "\n".join([body, "", *names, *([""] if names else []), str(index)])


def _block(outcome: VariantOutcome) -> str:
    """Write the one variant of a build beside its base."""
    from gemma_pack.console import format_bytes, table
    from gemma_pack.reports.wording import VERDICT_WORDS

    report = outcome.report
    if report is None or outcome.base_size_bytes is None or outcome.size_bytes is None:
        raise AssertionError("only a validated variant has a block")
    rows = [
        ["size", format_bytes(outcome.base_size_bytes), format_bytes(outcome.size_bytes)],
        ["perplexity", f"{report.likelihood.ppl_base:.2f}", f"{report.likelihood.ppl_variant:.2f}"],
        ["KL(base‖variant)", "", f"{report.divergence.kl_nats.value:.4f} nats"],
        ["same first choice", "", f"{100 * report.divergence.same_top1.value:.1f} %"],
        ["verdict", "", VERDICT_WORDS[report.verdict]],
    ]
    return table(rows, header=[outcome.recipe, "bf16", "variant"])


def _matrix(outcomes: Sequence[VariantOutcome]) -> str:
    """Write many variants, a row each, below the row of their base; then why stages failed."""
    from gemma_pack.console import table

    rows: list[list[str]] = []
    for model in dict.fromkeys(outcome.model for outcome in outcomes):
        rows += _rows(model, [outcome for outcome in outcomes if outcome.model == model])
    shown = table(rows, header=["variant", "size", "of bf16", "perplexity", "KL, nats", "same", "verdict"])
    failed = [
        f"{one.recipe} of {one.model} failed to {one.failure.stage}: {one.failure.message}"
        for one in outcomes
        if one.failure
    ]
    return "\n".join([shown, *([""] if failed else []), *failed])


def _rows(model: str, outcomes: Sequence[VariantOutcome]) -> Iterator[list[str]]:
    from gemma_pack.console import format_bytes
    from gemma_pack.reports.wording import OUTCOME_WORDS

    base = next((one for one in outcomes if one.report), None)
    size = format_bytes(base.base_size_bytes) if base and base.base_size_bytes else ""
    perplexity = f"{base.report.likelihood.ppl_base:.2f}" if base and base.report else ""
    yield [model.rstrip("/").rpartition("/")[2], size, "", perplexity, "", "", ""]
    for one in outcomes:
        report = one.report
        yield [
            f"  {one.recipe}",
            format_bytes(one.size_bytes) if one.size_bytes else "",
            f"{100 * one.share:.1f} %" if one.share else "",
            f"{report.likelihood.ppl_variant:.2f}" if report else "",
            f"{report.divergence.kl_nats.value:.4f}" if report else "",
            f"{100 * report.divergence.same_top1.value:.1f} %" if report else "",
            OUTCOME_WORDS[one.word],
        ]
