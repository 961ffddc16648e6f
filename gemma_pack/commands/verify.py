"""`gemma-pack verify`: is an image whole, and could anybody use it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.inspect import who_text
from gemma_pack.commands.options import parse_platform, platform_option, registry_options, with_console

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.console import Console
    from gemma_pack.oci.compatibility import Compatibility
    from gemma_pack.oci.verification import Verification


@click.command(
    epilog="""\b
Examples:
  gemma-pack verify quay.io/team/gemma-3-270m-it:w4a16
  gemma-pack verify gemma-3-270m-it-quantized.w4a16.oci --full"""
)
@click.argument("image", metavar="REF|LAYOUT")
@click.option("--full", is_flag=True, help="Read every blob and compare its digest, too.")
@platform_option
@registry_options
@with_console
def command(image: str, platform: str, *, full: bool, plain_http: bool, ca_file: Path | None, console: Console) -> None:
    """Check that an image is whole, and that somebody could use it.

    Reads the manifests of all platforms back, and asks for every blob and its size. Then applies the rules of
    gemma-pack inspect.

    \b
    Exit codes: 0 whole, and of use; 1 something is missing or damaged;
    15 whole, and no consumer could use it.
    """
    from gemma_pack.errors import UnusableImageError
    from gemma_pack.oci.compatibility import check_compatibility
    from gemma_pack.oci.retry import Retry
    from gemma_pack.oci.verification import verify

    wanted = parse_platform(platform)
    retry = Retry(tell=console.status)
    found = verify(image, full=full, plain_http=plain_http, ca_file=ca_file, retry=retry, reporter=console)
    result = None
    if not found.problems:
        result = check_compatibility(image, platform=wanted, plain_http=plain_http, ca_file=ca_file, retry=retry)
    console.result({"verification": found, "compatibility": result}, _text(found, result))
    found.require_whole()
    if result and result.works_for_nobody:
        raise UnusableImageError(
            f"{found.name} is whole, and no consumer could use it", hint="the reasons stand beside each consumer"
        )


def _text(found: Verification, result: Compatibility | None) -> str:
    from gemma_pack.console import format_bytes

    how = "hashed" if found.hashed_bytes else "there, each at its size"
    whole = f"{found.blobs} blobs of {found.manifests} manifests {how}: {format_bytes(found.size_bytes)}"
    problems = [textwrap.fill(problem, 80) for problem in found.problems]
    lines = [found.digest, *(problems or [whole]), f"checked in {found.seconds:.1f} s"]
    return "\n".join(lines) + (f"\n\n{who_text(result)}" if result else "")
