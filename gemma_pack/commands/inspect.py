"""`gemma-pack inspect`: what an image is and for whom it works, without fetching it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

import click

from gemma_pack.commands.options import parse_platform, platform_option, registry_options, with_console

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.console import Console
    from gemma_pack.oci.compatibility import Compatibility

_WIDTH: Final = 80
_TITLE_WIDTH: Final = 44


@click.command(
    epilog="""\b
Examples:
  gemma-pack inspect quay.io/team/gemma-3-270m-it:w4a16
  gemma-pack inspect gemma-3-270m-it-quantized.w4a16.oci --format json"""
)
@click.argument("image", metavar="REF|LAYOUT")
@platform_option
@registry_options
@with_console
def command(image: str, platform: str, *, plain_http: bool, ca_file: Path | None, console: Console) -> None:
    """Say what an image is and for whom it works, by a few KB of it.

    Reads manifest, tar headers, small files and the headers of the weights, and applies the rules of KServe's three
    ways to mount an image, of container runtimes, ilab and ModelPack readers, and of the server that loads the model.
    gemma-pack verify also checks that every blob is there.
    """
    from gemma_pack.oci.compatibility import check_compatibility
    from gemma_pack.oci.retry import Retry

    retry = Retry(tell=console.status)
    result = check_compatibility(
        image, platform=parse_platform(platform), plain_http=plain_http, ca_file=ca_file, retry=retry
    )
    console.result(result, f"{_what(result)}\n\n{who_text(result)}")


def who_text(result: Compatibility) -> str:
    """Return a table of the consumers, and what else was found, within 80 columns."""
    from gemma_pack.console import format_bytes, table
    from gemma_pack.oci.lint import NAMES

    width = _WIDTH - max(map(len, NAMES.values())) - len("  unknown  ")
    rows: list[tuple[str, str, str]] = []
    for judgement in result.judgements:
        why = [line for reason in judgement.reasons for line in textwrap.wrap(reason, width)] or [""]
        rows.append((NAMES[judgement.consumer], judgement.verdict, why[0]))
        rows += [("", "", line) for line in why[1:]]
    notes = [
        textwrap.fill(
            f"{finding.severity}: {finding.message}" + (f"; {finding.remedy}" if finding.remedy else ""), _WIDTH
        )
        for finding in result.findings
        if finding.severity == "warning"
    ]
    remedies = dict.fromkeys(
        finding.remedy for finding in result.findings if finding.severity != "warning" and finding.remedy
    )
    notes += [textwrap.fill(f"remedy: {remedy}", _WIDTH) for remedy in remedies]
    cost = f"{format_bytes(result.bytes_read)} read of {format_bytes(result.size_bytes)}"
    return "\n\n".join([table(rows, header=("consumer", "verdict", "why")), *notes, cost])


def _what(result: Compatibility) -> str:
    from gemma_pack.console import format_bytes, table

    title = result.annotations.get("org.opencontainers.image.title", "unnamed")
    about = [title, result.kind, *result.platforms, format_bytes(result.size_bytes)]
    lines = [textwrap.fill(", ".join(about), _WIDTH), result.digest]
    if description := result.annotations.get("org.opencontainers.image.description"):
        lines.append(textwrap.fill(description, _WIDTH))
    rows = [
        (
            (layer.title or "(untitled)").removesuffix(".tar")[:_TITLE_WIDTH],
            format_bytes(layer.size_bytes),
            layer.media_type.rpartition(".")[2],
            layer.digest.removeprefix("sha256:")[:12],
        )
        for layer in result.layers
    ]
    layers = table(rows, header=("layer", "size", "type", "digest"))
    weights = f"{result.tensors} tensors, {format_bytes(result.weights_bytes)}"
    return "\n".join([*lines, "", layers, "", weights])
