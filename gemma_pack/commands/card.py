"""`gemma-pack card`: the model card of a variant, from its record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import with_console

if TYPE_CHECKING:
    from gemma_pack.console import Console


@click.command(
    "card",
    epilog="""\b
Examples:
  gemma-pack card gemma-2-9b-it-quantized.w4a16
  gemma-pack card --format json gemma-3-270m-quantized.w4a16""",
)
@click.argument("directory", type=click.Path(path_type=Path))
@with_console
def command(directory: Path, console: Console) -> None:
    """Write README.md, the model card, into the variant DIRECTORY.

    The card is generated from gemma-pack.json; quantize and validate write it too. Edits to README.md are lost.
    """
    from gemma_pack.reports.card import write_card

    path = write_card(directory)
    console.result({"card": str(path)}, str(path))
