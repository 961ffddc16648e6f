"""`gemma-pack pull`: the checkpoint in an image comes to lie in a directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import parse_platform, platform_option, registry_options, with_console

if TYPE_CHECKING:
    from gemma_pack.console import Console
    from gemma_pack.oci.pull import PullResult


@click.command(
    epilog="""\b
Examples:
  gemma-pack pull quay.io/team/gemma-3-270m-it:w4a16 \\
      -o gemma-3-270m-it-quantized.w4a16
  gemma-pack pull 127.0.0.1:5000/gemma:w4a16 -o /srv/models/gemma \\
      --platform linux/arm64"""
)
@click.argument("image", metavar="REF|LAYOUT")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The directory to write.")
@platform_option
@registry_options
@with_console
def command(
    image: str, output: Path, platform: str, *, plain_http: bool, ca_file: Path | None, console: Console
) -> None:
    """Pull the checkpoint of a modelcar image or an artifact.

    Each byte is checked, and the directory appears whole or not at all. After an interruption, the same command
    fetches the rest. Of a modelcar only files under /models are unpacked, never links or paths that lead elsewhere.
    """
    from gemma_pack.oci.pull import pull

    wanted = parse_platform(platform)
    result = pull(image, output, platform=wanted, plain_http=plain_http, ca_file=ca_file, reporter=console)
    console.result(result, _text(result))


def _text(result: PullResult) -> str:
    from gemma_pack.console import format_bytes, table

    if result.already_there:
        return f"{result.directory} was already there, from {result.digest}"
    rows = [
        ("downloaded", format_bytes(result.downloaded_bytes)),
        ("kept from before", format_bytes(result.resumed_bytes)),
        ("written", format_bytes(result.size_bytes)),
    ]
    rate = f", {format_bytes(result.downloaded_bytes / result.seconds)}/s" if result.downloaded_bytes else ""
    return (
        f"{table(rows)}\n\n{result.directory} written: {result.files} files in {result.seconds:.1f} s{rate}\n"
        f"from {result.reference}, {result.digest}"
    )
