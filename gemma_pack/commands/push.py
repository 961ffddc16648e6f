"""`gemma-pack push`: an image goes into a registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import registry_options, with_console

if TYPE_CHECKING:
    from gemma_pack.console import Console
    from gemma_pack.oci.push import PushResult


@click.command(
    epilog="""\b
Examples:
  gemma-pack push gemma-3-270m-it-quantized.w4a16.oci quay.io/team/gemma-3-270m-it:w4a16
  gemma-pack push gemma-2-9b-it-quantized.w4a16 ghcr.io/team/gemma-2-9b-it:w4a16 --mount-from team/gemma-2-9b-it-bf16"""
)
@click.argument("source", type=click.Path(path_type=Path), metavar="LAYOUT|DIR")
@click.argument("reference", metavar="REF")
@click.option(
    "--mount-from",
    multiple=True,
    metavar="REPO",
    help="A repository of the same registry to take equal layers from; may be given several times.",
)
@registry_options
@with_console
def command(
    source: Path,
    reference: str,
    mount_from: tuple[str, ...],
    *,
    plain_http: bool,
    ca_file: Path | None,
    console: Console,
) -> None:
    """Push an OCI layout or a checkpoint to a registry.

    A checkpoint is packed while it is sent, and only what the registry lacks is sent. The tag is set when the image is
    whole, and everything is asked for again. After an interruption, the same command sends the rest. Logins are
    those of podman and docker.
    """
    from gemma_pack.oci.push import push

    result = push(source, reference, mount_from=mount_from, plain_http=plain_http, ca_file=ca_file, reporter=console)
    console.result(result, _text(result))
    console.hint(f"gemma-pack deploy {result.pinned} --target kserve")


def _text(result: PushResult) -> str:
    from gemma_pack.console import format_bytes, table

    rate = f", {format_bytes(result.uploaded_bytes / result.seconds)}/s" if result.uploaded_bytes else ""
    rows = [
        ("uploaded", format_bytes(result.uploaded_bytes)),
        ("already there", format_bytes(result.existed_bytes)),
        ("mounted", format_bytes(result.mounted_bytes)),
    ]
    return f"{table(rows)}\n\n{result.pinned}\npushed as {result.reference} in {result.seconds:.1f} s{rate}"
