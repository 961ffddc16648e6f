"""`gemma-pack deploy`: what a server needs to serve an image."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from gemma_pack.commands.options import registry_options, verifying_option, with_console

if TYPE_CHECKING:
    from gemma_pack.console import Console
    from gemma_pack.deploy.image import ServedImage
    from gemma_pack.oci.signing import PublicKey

TARGETS: Final = ("vllm", "rhaiis", "rhelai", "kserve")
HOW: Final = ("format", "quiet")
"""Parameters that say how the result is printed, not what it is."""
SCHEMES: Final = ("oci", "oci+modelcar", "oci+native", "oci+fetch")


@click.command(
    epilog="""\b
Examples:
  gemma-pack deploy quay.io/team/gemma-2-9b-it:w4a16 --target kserve \\
      | kubectl apply -f -
  gemma-pack deploy quay.io/team/gemma-2-9b-it:w4a16 --target rhaiis \\
      --max-model-len 4096 -o serving"""
)
@click.argument("reference", metavar="REF")
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    required=True,
    help="vLLM here, Red Hat AI Inference Server with podman, RHEL AI with ilab, or KServe and OpenShift AI.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Directory to make of the files  [default: print them]"
)
@click.option("--name", help="What the service and the model are called  [default: from the repository]")
@click.option("--max-model-len", type=click.IntRange(min=1), help="Longest context in tokens  [default: the model's]")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Requests of that length whose KV cache must fit at once.",
)
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=1),
    default=85,
    show_default=True,
    metavar="GB",
    help="Of one GPU, in 10^9 bytes: 24 for L4 and A10G, 48 for L40S, 85 for A100 and H100. A model that does not fit "
    "is split.",
)
@click.option("--server-image", metavar="IMAGE", help="The server's image, for rhaiis and kserve.")
@click.option(
    "--storage-scheme",
    type=click.Choice(SCHEMES),
    help="How KServe gets at the files  [default: oci, which leaves it to the cluster]",
)
@click.option("--pull-secret", metavar="NAME", help="Secret with the registry's login, for kserve.")
@click.option("--allow-unvalidated", is_flag=True, help="Take an image that no attached report says has passed, too.")
@verifying_option
@registry_options
@with_console
def command(
    reference: str,
    target: str,
    output: Path | None,
    name: str | None,
    max_model_len: int | None,
    concurrency: int,
    gpu_memory: float,
    server_image: str | None,
    storage_scheme: str | None,
    pull_secret: str | None,
    verify_key: Path | None,
    *,
    allow_unvalidated: bool,
    plain_http: bool,
    ca_file: Path | None,
    console: Console,
) -> None:
    """Write what a server needs to serve an image.

    It is pinned by its digest, and must have passed its validation: a report that says so is attached to it, by push
    or by validate. GPUs, memory and disk are computed from the image's record and config. The files go to stdout, the
    commands that come next to stderr.
    """
    from dataclasses import asdict

    from gemma_pack.deploy import MAKERS, write_bundle
    from gemma_pack.deploy.options import DIRECTORY, Options
    from gemma_pack.deploy.resources import Demand, plan_resources
    from gemma_pack.disk import refuse_existing
    from gemma_pack.oci.signing import load_public_key

    options = Options(
        name=name,
        server_image=server_image,
        storage_scheme=storage_scheme,
        pull_secret=pull_secret,
        directory=output or DIRECTORY,
    )
    if output:
        refuse_existing(output)
    key = load_public_key(verify_key) if verify_key else None
    image = _find(
        reference,
        key,
        allow_unvalidated=allow_unvalidated,
        plain_http=plain_http,
        ca_file=ca_file,
        console=console,
    )
    demand = Demand(
        max_model_len=max_model_len, concurrency=concurrency, gpu_memory_bytes=round(gpu_memory * 1_000_000_000)
    )
    resources = plan_resources(image, demand)
    bundle = MAKERS[target](image, resources, options)
    if output:
        write_bundle(bundle, output)
    for warning in bundle.warnings:
        console.warn(warning)
    steps = bundle.steps if output else (_again(DIRECTORY), *bundle.steps)
    data = {
        "target": target,
        "reference": image.reference,
        "directory": str(output) if output else None,
        "resources": asdict(resources),
        "files": {file.name: file.text for file in bundle.files},
        "steps": steps,
    }
    written = "\n".join(str(output / file.name) for file in bundle.files) if output else ""
    console.result(data, written or bundle.text.rstrip("\n"))
    for step in steps:
        console.hint(step)


def _again(directory: Path) -> str:
    """Return the command that the user gave, as one that writes the files into `directory` instead of printing them."""
    from click.core import ParameterSource

    context = click.get_current_context()
    words = ["gemma-pack", "deploy"]
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE or name in HOW:
            continue
        value = context.params[name]
        if isinstance(parameter, click.Option):
            words.append(parameter.opts[-1])
        if value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return f"{shlex.join([*words, '-o', str(directory)])}  # writes the files above"


def _find(
    reference: str,
    key: PublicKey | None,
    *,
    allow_unvalidated: bool,
    plain_http: bool,
    ca_file: Path | None,
    console: Console,
) -> ServedImage:
    """Ask the registry for the image, pin what it answers, and weigh the reports that are attached to it."""
    from gemma_pack.deploy.image import ServedImage
    from gemma_pack.errors import GateFailedError, GateUndecidedError, GemmaPackError
    from gemma_pack.oci.describe import describe
    from gemma_pack.oci.examination import examine, require_passing_report, require_signature
    from gemma_pack.oci.retry import Retry
    from gemma_pack.oci.source import registry_reference

    parsed = registry_reference(reference)
    retry = Retry(tell=console.status)
    found = describe(parsed, plain_http=plain_http, ca_file=ca_file, retry=retry)
    pinned = str(parsed.pinned(found.digest))
    evidence = examine(found, key=key, plain_http=plain_http, ca_file=ca_file, retry=retry)
    verdict, signer, lacking = None, None, ""
    try:
        report = require_passing_report(evidence, pinned, by_key=key is not None)
        verdict, signer = report.verdict, report.signer if report.signed == "verified" else None
    except GemmaPackError as error:
        if not allow_unvalidated:
            raise
        if key and not any(one.signed == "verified" for one in evidence):
            require_signature(evidence, pinned)
        lacking = error.message
        if isinstance(error, (GateFailedError, GateUndecidedError)):
            verdict = "fail" if isinstance(error, GateFailedError) else "undecided"
    image = ServedImage(
        reference=pinned,
        tag=parsed.tag,
        size_bytes=found.size_bytes,
        record=found.record,
        config=found.config,
        answers_chat=found.has_chat_template,
        is_artifact=found.is_artifact,
        report_verdict=verdict,
        report_signer=signer,
    )
    if lacking and image.verdict == "pass":  # so it says itself; any other verdict is warned of with the files
        console.warn(lacking)
    return image
