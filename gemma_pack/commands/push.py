"""`gemma-pack push`: an image goes into a registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_pack.commands.options import base_options, chosen_base, registry_options, signing_option, with_console
from gemma_pack.errors import CheckpointError, InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_pack.console import Console
    from gemma_pack.oci.evidence import AttachedDocument
    from gemma_pack.oci.push import PushResult
    from gemma_pack.report import Report


@click.command(
    epilog="""\b
Examples:
  gemma-pack push gemma-3-270m-it-quantized.w4a16.oci \\
      quay.io/team/gemma-3-270m-it:w4a16
  gemma-pack push gemma-2-9b-it-quantized.w4a16 \\
      ghcr.io/team/gemma-2-9b-it:w4a16 --mount-from team/gemma-2-9b-it-bf16
  gemma-pack push gemma-2-9b-it-quantized.w4a16 \\
      quay.io/team/gemma-2-9b-it:w4a16 --require-verdict --sign-key my.key"""
)
@click.argument("source", type=click.Path(path_type=Path), metavar="LAYOUT|DIR")
@click.argument("reference", metavar="REF")
@click.option(
    "--mount-from",
    multiple=True,
    metavar="REPO",
    help="A repository of the same registry to take equal layers from; may be given several times.",
)
@click.option("--require-verdict", is_flag=True, help="Send nothing unless the variant has passed its validation.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="The report, or its directory  [default: beside the source]"
)
@click.option("--no-referrers", is_flag=True, help="Attach nothing to the image.")
@click.option(
    "--digest-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the image's digest into this file when all is done.",
)
@base_options
@signing_option
@registry_options
@with_console
def command(
    source: Path,
    reference: str,
    mount_from: tuple[str, ...],
    report: Path | None,
    sign_key: Path | None,
    base: str,
    platform: tuple[str, ...],
    digest_file: Path | None,
    *,
    require_verdict: bool,
    no_referrers: bool,
    plain_http: bool,
    ca_file: Path | None,
    console: Console,
) -> None:
    """Push an OCI layout or a checkpoint to a registry.

    A checkpoint is packed while it is sent, each file read once and copied nowhere, and only what the registry lacks
    is sent: a second variant of a model shares the layers that are equal. The tag is set when the image is whole, and
    everything is asked for again. After an interruption, or kill -9, the same command sends the rest. Logins are those
    of podman and docker.

    Bill of materials, provenance and the validation report are attached to the image, for gemma-pack referrers, cosign
    and oras. With a key they are signed, and so are the image and the model's files; without one, by nobody.
    """
    from gemma_pack.disk import require_makeable, write_output
    from gemma_pack.oci.evidence import attach_evidence, find_report
    from gemma_pack.oci.push import push
    from gemma_pack.oci.signing import load_signing_key

    if no_referrers and sign_key:
        raise InvalidUsageError("a signature is a referrer, too", hint="leave out --no-referrers or --sign-key")
    if digest_file:
        require_makeable(digest_file, option="--digest-file")
        write_output(digest_file, "")  # nobody must take an earlier push's digest for this one's
    key = load_signing_key(sign_key) if sign_key else None
    found = find_report(source, report, console) if report or require_verdict or not no_referrers else None
    if require_verdict:
        _require_verdict(found, source)
    network: Any = {"plain_http": plain_http, "ca_file": ca_file}
    under = chosen_base(base, platform, ca_file=ca_file)  # --plain-http is of the registry that is pushed to
    result = push(source, reference, mount_from=mount_from, base=under, **network, reporter=console)
    attached: list[AttachedDocument] = []
    if not no_referrers:
        try:
            attached = attach_evidence(result.pinned, source, report=found, key=key, **network, reporter=console)
        except CheckpointError as error:  # an image of something else: there is nothing to say about it
            if key:
                raise
            console.warn(f"nothing is attached: {error.message}")
    data = {**result.model_dump(), "attached": [one.model_dump() for one in attached]}
    console.result(data, _text(result, attached))
    if digest_file:
        write_output(digest_file, result.digest)
    console.hint(_next(result))


def _require_verdict(report: Report | None, source: Path) -> None:
    from gemma_pack.commands.validate import raise_verdict
    from gemma_pack.errors import GemmaPackError
    from gemma_pack.report import report_directory

    if report is None:
        raise GemmaPackError(
            f"{source} has no validation report, and nothing was sent",
            hint="run gemma-pack validate first, or say with --report where the report lies",
        )
    raise_verdict(report, report_directory(source))


def _next(result: PushResult) -> str:
    """Return what to do with what was pushed; ilab takes a tag in an option of its own, and no digest."""
    if not result.is_artifact:
        return f"gemma-pack deploy {result.pinned} --target kserve"
    from gemma_pack.oci.reference import DEFAULT_TAG, parse_reference

    named = parse_reference(result.reference)
    repository = f"docker://{named.host}/{named.repository}"
    return f"ilab model download --repository {repository} --release {named.tag or DEFAULT_TAG}"


def _text(result: PushResult, attached: Sequence[AttachedDocument]) -> str:
    from gemma_pack.console import format_bytes, table

    rate = f", {format_bytes(result.uploaded_bytes / result.seconds)}/s" if result.uploaded_bytes else ""
    rows = [
        ("uploaded", format_bytes(result.uploaded_bytes)),
        ("already there", format_bytes(result.existed_bytes)),
        ("mounted", format_bytes(result.mounted_bytes)),
    ]
    if result.shared_with:
        rows.append((f"shared with {result.shared_with}", format_bytes(result.shared_bytes)))
    lines = [table(rows), "", result.pinned, f"pushed as {result.reference} in {result.seconds:.1f} s{rate}"]
    if attached:
        kinds = ", ".join(one.kind for one in attached)
        lines.append(f"attached: {kinds}; signed by {attached[0].signer or 'nobody'}")
    return "\n".join(lines)
