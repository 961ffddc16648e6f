"""`gemma-pack package`: a checkpoint directory becomes an OCI modelcar image on disk."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import base_options, chosen_base, registry_options, with_console

if TYPE_CHECKING:
    from gemma_pack.console import Console
    from gemma_pack.oci.package import Kind, PackageResult


@click.command(
    epilog="""\b
Examples:
  gemma-pack package gemma-3-270m-it-quantized.w4a16 --layout both
  gemma-pack package gemma-2-9b-it-quantized.w4a16 -o image.oci \\
      --base registry.access.redhat.com/ubi9/ubi-micro:9.8"""
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The OCI layout to write; with --layout both, the modelcar's, and the artifact's is named after it.  "
    "[default: DIRECTORY.oci, or DIRECTORY.artifact.oci]",
)
@click.option(
    "--layout",
    type=click.Choice(["modelcar", "artifact", "both"]),
    default="modelcar",
    show_default=True,
    help="A modelcar has the files under /models in an image, for KServe. An artifact has them as they are, one a "
    "layer, for ilab, oras and ModelPack. Both are two layouts, from one reading of each file.",
)
@base_options
@registry_options
@with_console
def command(
    directory: Path,
    output: Path | None,
    layout: str,
    base: str,
    platform: tuple[str, ...],
    *,
    plain_http: bool,
    ca_file: Path | None,
    console: Console,
) -> None:
    """Pack a checkpoint as an OCI image, in a layout on disk.

    By default it is a modelcar for every platform of its base: the files come to lie under /models, one uncompressed
    layer a shard, so that all variants and platforms share what is equal. The same directory gives the same
    digest on any machine. Hidden files are left out.
    """
    from gemma_pack.oci.package import package
    from gemma_pack.oci.package_pair import package_pair

    named = directory if directory.name not in {"", ".."} else directory.resolve()
    target = output or named.with_name(f"{named.name}.artifact.oci" if layout == "artifact" else f"{named.name}.oci")
    under = chosen_base(base, platform, plain_http=plain_http, ca_file=ca_file)
    results: tuple[PackageResult, ...]
    if layout == "both":
        beside = target.with_name(target.name.removesuffix(".oci") + ".artifact.oci")
        pair = package_pair(directory, target, beside, base=under, reporter=console)
        results = (pair.modelcar, pair.artifact)
        console.result(pair, "\n\n".join(map(_text, results)))
    else:
        kind: Kind = "artifact" if layout == "artifact" else "modelcar"
        results = (package(directory, target, kind=kind, base=under, reporter=console),)
        console.result(results[0], _text(results[0]))
    for result in results:
        if result.base == "none":
            console.warn("without a base, KServe mounts it as oci+native:// or oci+fetch:// only, not as oci://")
        suffix = "-artifact" if layout == "both" and result.kind == "artifact" else ""
        console.hint(f"gemma-pack push {shlex.quote(str(result.layout))} REGISTRY/NAME:TAG{suffix}")


def _text(result: PackageResult) -> str:
    from gemma_pack.console import format_bytes, table

    rows = [
        (layer.title.removesuffix(".tar"), format_bytes(layer.size_bytes), layer.digest.removeprefix("sha256:")[:12])
        for layer in result.layers
    ]
    whole = "the artifact" if result.kind == "artifact" else "the image, with its base"
    rows.append((whole, format_bytes(result.size_bytes), ""))
    verb = "was already there" if result.already_there else "written"
    platforms = f": {', '.join(result.platforms)}" if result.platforms else ""
    layers = table(rows, header=("layer", "size", "digest"))
    return f"{layers}\n\n{result.layout} {verb}{platforms}\n{result.digest}"
