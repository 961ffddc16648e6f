"""`gemma-pack recipes`: list, show and check recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import with_console
from gemma_pack.console import table

if TYPE_CHECKING:
    from gemma_pack.console import Console


class _ListByDefault(click.Group):
    """A group whose default is `list`: `recipes --format json` is `recipes list --format json`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `list` before options that are not the group's own."""
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(
    "recipes",
    cls=_ListByDefault,
    epilog="""\b
Examples:
  gemma-pack recipes show w4a16 > mine.yaml
  gemma-pack recipes check mine.yaml""",
)
def command() -> None:
    """List, show and check recipes. Without a command it lists."""


@command.command(
    "list",
    epilog="""\b
Examples:
  gemma-pack recipes list
  gemma-pack recipes list --format json""",
)
@with_console
def list_(console: Console) -> None:
    """List the shipped recipes."""
    from gemma_pack.recipe import load_recipe, shipped_names

    found = [load_recipe(name) for name in shipped_names()]
    width = max(len(recipe.name) for recipe in found)
    lines = [f"{recipe.name.ljust(width)}  {recipe.summary}" for recipe in found]
    console.result({"recipes": [recipe.model_dump(mode="json") for recipe in found]}, "\n".join(lines))


@command.command(
    "show",
    epilog="""\b
Examples:
  gemma-pack recipes show w4a16
  gemma-pack recipes show w4a16 > mine.yaml""",
)
@click.argument("name")
@with_console
def show(name: str, console: Console) -> None:
    """Print a shipped recipe as it is, comments included."""
    from gemma_pack.recipe import parse_recipe, shipped_text

    text = shipped_text(name)
    console.result(parse_recipe(text, origin=f"{name}.yaml"), text.rstrip("\n"))


@command.command(
    "check",
    epilog="""\b
Examples:
  gemma-pack recipes check mine.yaml
  gemma-pack recipes check mine.yaml --format json""",
)
@click.argument("file")
@with_console
def check(file: str, console: Console) -> None:
    """Check a recipe; exit 2 and name each mistake by its line."""
    from gemma_pack.recipe import load_recipe

    recipe = load_recipe(file)
    text = recipe.calibration.dataset if recipe.calibration else "none"
    rows = [["name", recipe.name], ["digest", recipe.digest()], ["calibration", text]]
    console.result(recipe, f"{file} is valid\n" + table(rows))
