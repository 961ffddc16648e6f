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
  gemma-pack card --check published.md gemma-2-9b-it-quantized.w4a16 \\
      --format json""",
)
@click.argument("directory", type=click.Path(path_type=Path), required=False)
@click.option(
    "--check",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Compare the card FILE with the record in DIRECTORY, by default FILE's own; write nothing.",
)
@with_console
def command(directory: Path | None, check: Path | None, console: Console) -> None:
    """Write README.md, the model card, into the variant DIRECTORY.

    The card is generated from gemma-pack.json; quantize and validate write it too. Edits to README.md are lost.

    With --check: any card, whoever wrote it, whose front matter, verdict, tables, digests or figures with units say
    something else than the record ends with exit code 1, each difference with its line. It is no verdict on
    the variant, so never 10.
    """
    from gemma_pack.errors import InvalidUsageError
    from gemma_pack.reports.card import write_card

    if check:
        _check(check, directory or check.parent, console)
        return
    if directory is None:
        raise InvalidUsageError("the variant's directory is missing", hint="gemma-pack card DIRECTORY")
    path = write_card(directory)
    console.result({"card": str(path)}, str(path))


def _check(card: Path, directory: Path, console: Console) -> None:
    from dataclasses import asdict

    from gemma_pack.errors import GemmaPackError, InvalidUsageError
    from gemma_pack.reports.card import render_card
    from gemma_pack.reports.card_check import compare_cards
    from gemma_pack.yaml_file import read_text

    text = read_text(card, hint="name the card's Markdown file", error=InvalidUsageError)
    found = compare_cards(text, render_card(directory))
    lines = [f"{card}:{one.line}: {one.says}: the record {one.record}" for one in found]
    data = {"card": str(card), "agrees": not found, "disagreements": [asdict(one) for one in found]}
    console.result(data, "\n".join(lines) or f"{card} says what the record says")
    if found:
        raise GemmaPackError(
            f"{card} and the record of {directory} disagree in {len(found)} places",
            hint=f"gemma-pack card {directory} writes the card that the record stands for",
        )
