"""Lines of our documentation that call gemma-pack, held against the command line as it is."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

import click

from gemma_pack.commands import cli
from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


def calls(text: str) -> list[list[str]]:
    """Return the words of each call of gemma-pack in the shell blocks of a Markdown text."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.split(r" (?:\||<|>|&&) ?", line)[0] for line in lines if "gemma-pack " in line]
    words = [shlex.split(line, comments=True) for line in found]
    return [line[line.index("gemma-pack") :] for line in words if "gemma-pack" in line]


def complaints(words: Sequence[str]) -> list[str]:
    """Return what the command line refuses in `gemma-pack …`, without running it: nothing, or a sentence."""
    command: click.Command = cli
    context = click.Context(cli, info_name="gemma-pack")
    rest = list(words[1:])
    try:
        while isinstance(command, click.Group):
            _, found, rest = command.resolve_command(context, rest)
            assert found
            command, context = found, click.Context(found, info_name=found.name, parent=context)
        options, _, _ = command.make_parser(context).parse_args(args=rest)
        for parameter in command.params:
            if isinstance(parameter.type, click.Choice) and parameter.name in options:
                parameter.type_cast_value(context, options[parameter.name])
    except (click.UsageError, InvalidUsageError) as error:
        return [f"{' '.join(words)}: {error.message}"]
    return []
