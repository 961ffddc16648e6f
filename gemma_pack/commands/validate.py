"""`gemma-pack validate`: is the variant as good as its base, within a stated margin, and how sure is that?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_pack.commands.options import registry_options, signing_option, verifying_option, with_console

if TYPE_CHECKING:
    from gemma_pack.build import EngineChoice, TaskNames
    from gemma_pack.console import Console
    from gemma_pack.report import Report


@click.command(
    "validate",
    epilog="""\b
Examples:
  gemma-pack validate gemma-3-270m-quantized.w4a16 --extend
  gemma-pack validate gemma-2-9b-it-quantized.w4a16 --text wikitext2 \\
      --suite gemma-card
  gemma-pack validate quay.io/team/gemma-2-9b-it:w4a16 --verify-key my.pub
  gemma-pack validate gemma-2-9b-it-quantized.w4a16 \\
      --engine http://localhost:8000""",
)
@click.argument("variant", metavar="DIR|LAYOUT|REF")
@click.option("--against", metavar="MODEL", help="The bf16 base  [default: what the variant's record names]")
@click.option(
    "--profile",
    type=click.Choice(["smoke", "quick", "full"]),
    default="quick",
    show_default=True,
    help="How many windows and prompts, see above.",
)
@click.option("--extend", is_flag=True, help="Take more windows, once, where the verdict is undecided.")
@click.option(
    "--text", default="builtin", show_default=True, help="builtin, wikitext2, .txt or .jsonl file, hub dataset."
)
@click.option("--recipe", help="Recipe whose gate judges  [default: the variant's recipe.yaml]")
@click.option("--gate", metavar="MEASURE=MARGIN", multiple=True, help="Another margin, such as kl_nats=0.02.")
@click.option("--also", type=click.Choice(["wikitext2-gptq"]), help="Perplexity as papers have it, besides.")
@click.option("--report", type=click.Path(path_type=Path), help="Directory of the report  [default: VARIANT.report]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Windows and draws.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
@click.option(
    "--engine",
    metavar="transformers|vllm|URL",
    default="transformers",
    show_default=True,
    help="What computes: this process, vLLM's server, or one that serves the variant.",
)
@click.option("--base-engine", metavar="URL", help="Server of the base, with --engine URL  [default: this process]")
@click.option("--served-model", metavar="NAME", help="Which of the models that --engine URL serves.")
@click.option("--task", metavar="NAME", multiple=True, help="Task of lm-evaluation-harness, or a YAML file.")
@click.option("--suite", type=click.Choice(["gemma-card", "safety"]), help="Tasks of Google's model card.")
@click.option("--task-limit", type=click.IntRange(min=1), help="Items of each task at most  [default: all]")
@click.option("--offline", is_flag=True, help="Use no network.")
@click.option("--no-attach", is_flag=True, help="Leave an image in a registry as it is.")
@signing_option
@verifying_option
@registry_options
@with_console
def command(
    variant: str,
    report: Path | None,
    engine: str,
    base_engine: str | None,
    served_model: str | None,
    task: tuple[str, ...],
    suite: str | None,
    task_limit: int | None,
    gate: tuple[str, ...],
    also: str | None,
    sign_key: Path | None,
    verify_key: Path | None,
    console: Console,
    *,
    no_attach: bool,
    plain_http: bool,
    ca_file: Path | None,
    **options: Any,  # noqa: ANN401 - the rest, passed on as it is
) -> None:
    """Judge a variant against its bf16 base by its gate.

    The variant is a directory that quantize wrote, an OCI layout, or an image in a registry. An image is pulled by its
    digest and its bytes are checked; its signatures are shown, and the report is attached to the digest. Base and
    variant read the same text and answer the same prompts; the gate is the recipe's.

    \b
    Profiles, with the minutes that Gemma 3 270M takes on 2 CPU cores, in all:
      smoke    8 windows of  256 tokens,   4 prompts,   2040 scored, 0.3 min
      quick   32 windows of  512 tokens,  16 prompts,  16352 scored, 0.8 min
      full   256 windows of 1024 tokens, 128 prompts, 261888 scored, 11 min

    With --extend an undecided verdict takes as many more windows as would likely decide it, up to 8 times as many; both
    looks then use 97.5 % bounds. --also wikitext2-gptq adds the perplexity that papers quote, with no <bos> before its
    windows: to compare with papers, and judged by nothing.

    Engines: `transformers` sees whole distributions. A vLLM server shows the 20 most likely tokens of each, and KL
    is estimated from them, with its lower bound in the report. `vllm` starts the server with the Python that
    GEMMA_PACK_VLLM names, for base and variant one after the other. With a URL what is validated is what is served;
    one window is read here, too, to be sure of that.

    Tasks are asked of both, item by item, with greedy answers; the report has the difference with its bounds, the
    answers that changed, and the smallest difference that so many items could have shown. They do not change the
    verdict. Those that run code that the model wrote need HF_ALLOW_CODE_EVAL=1.

    Writes report.json, report.html, report.md and junit.xml, and the verdict into gemma-pack.json and README.md of
    a directory. In GitHub Actions the report is shown as the summary of the step, too.

    \b
    Exit codes: 0 pass, 10 the gate failed, 11 undecided: it needs more windows.
    """
    from gemma_pack.acceptance import Access, default_report_directory, is_image, validate_image
    from gemma_pack.build import validate_variant
    from gemma_pack.errors import InvalidUsageError
    from gemma_pack.oci.signing import load_public_key, load_signing_key
    from gemma_pack.report import report_directory

    settings = {
        "profile_name": options.pop("profile"),
        "recipe_name": options.pop("recipe"),
        "engine": engine_choice(engine, base_engine, served_model),
        "tasks": task_names(task, suite, task_limit),
        "margins": margins(gate),
        "gptq_protocol": also is not None,
        "reporter": console,
        **options,
    }
    if not is_image(variant):
        if sign_key or verify_key:
            raise InvalidUsageError(
                f"{variant} is a directory, whose report nobody signs",
                hint="gemma-pack push --sign-key signs it with the image; or name an image in a registry here",
            )
        target = report or report_directory(Path(variant))
        show(validate_variant(Path(variant), target, **settings), target, Path(variant).resolve().name, console)
        return
    access = Access(
        key=load_signing_key(sign_key) if sign_key else None,
        trusted=load_public_key(verify_key) if verify_key else None,
        attach=not no_attach,
        plain_http=plain_http,
        ca_file=ca_file,
    )
    target = report or default_report_directory(variant)
    found = validate_image(variant, target, access, **settings)
    show(found.report, target, found.name, console, found.lines())


def show(report: Report, target: Path, name: str, console: Console, lines: list[str] | None = None) -> None:
    """Print the report, which lies in `target`, and raise its verdict; `lines` are said besides."""
    from gemma_pack.console import table
    from gemma_pack.reports import task_table, wording
    from gemma_pack.reports.writing import append_summary

    shown = [table(wording.narrow_rows(report.metrics), header=wording.header(report))]
    if report.tasks:
        shown.append(table(task_table.short_rows(report.tasks), header=task_table.SHORT_HEADER))
    shown.append("\n".join([*(lines or []), f"{wording.VERDICT_WORDS[report.verdict]}: {target / 'report.html'}"]))
    console.result(report, "\n\n".join(shown))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            append_summary(report, Path(summary), name)
        except OSError as error:  # the verdict stands
            console.warn(f"the summary of the step cannot be written: {error.strerror} at {summary}")
    raise_verdict(report, target)


def margins(gate: tuple[str, ...]) -> dict[str, float]:
    """Return the margins that `--gate` gives by measure; raise InvalidUsageError for what is not MEASURE=NUMBER."""
    from gemma_pack.errors import InvalidUsageError

    found: dict[str, float] = {}
    for text in gate:
        name, _, number = text.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError as error:
            raise InvalidUsageError(f"{text} is no margin", hint="--gate kl_nats=0.02") from error
    return found


def engine_choice(engine: str, base_engine: str | None, served_model: str | None) -> EngineChoice | None:
    """Return the servers that the options name; None for this process.

    Raises:
        InvalidUsageError: the options do not go together.
        MachineError: vLLM is asked for, and there is none.
    """
    from gemma_pack.build import EngineChoice
    from gemma_pack.errors import InvalidUsageError

    if engine in ("transformers", "vllm"):
        if base_engine or served_model:
            raise InvalidUsageError(
                f"--base-engine and --served-model do not go with --engine {engine}",
                hint="give the address of the server of the variant with --engine",
            )
    elif not engine.startswith(("http://", "https://")):
        raise InvalidUsageError(
            f"there is no engine {engine}", hint="--engine takes transformers, vllm or http://HOST:PORT"
        )
    if engine == "transformers":
        return None
    if engine == "vllm":
        from gemma_pack.vllm import find_vllm

        find_vllm()  # before gigabytes are fetched for nothing
    return EngineChoice(engine=engine, base_engine=base_engine, served_model=served_model)


def task_names(tasks: tuple[str, ...], suite: str | None, limit: int | None) -> TaskNames | None:
    """Return the tasks that the options name; None for none.

    Raises:
        InvalidUsageError: there is a limit and nothing to limit.
        MachineError: the harness is not installed.
    """
    from gemma_pack.build import TaskNames
    from gemma_pack.errors import InvalidUsageError
    from gemma_pack.evaluation.tasks import require_harness

    if not tasks and not suite:
        if limit:
            raise InvalidUsageError("--task-limit is of no use alone", hint="name a task with --task, or a --suite")
        return None
    require_harness()
    return TaskNames(names=tasks, suite=suite, limit=limit)


def raise_verdict(report: Report, target: Path) -> None:
    """Raise GateFailedError or GateUndecidedError for a report that is no pass; `target` holds the report."""
    from gemma_pack.errors import GateFailedError, GateUndecidedError
    from gemma_pack.reports.wording import reasons

    why = "; ".join(reasons(report))
    if report.verdict == "fail":
        raise GateFailedError(f"the variant is worse than its gate allows: {why}", hint=f"see {target / 'report.html'}")
    if report.verdict == "undecided":
        extend = "--extend or " if report.protocol.first_look_windows is None else ""  # which looks once more, no more
        raise GateUndecidedError(
            f"the evidence is too small for a verdict: {why}",
            hint=f"use {extend}--profile full, or a longer text with --text",
        )
