"""Options that several commands share, one named decorator each."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gemma_pack.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")


def with_console(command: F) -> F:
    """Give a command `--format` and `--quiet`, and pass it the console built from them as `console`."""

    @click.option(
        "--format",
        type=click.Choice(["human", "json"]),
        default="human",
        help="How to print the result.",
    )
    @click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
    @functools.wraps(command)
    def wrapper(*args: Any, quiet: bool, **kwargs: Any) -> Any:  # noqa: ANN401 - click's own
        as_json = kwargs.pop("format") == "json"
        console = Console("json" if as_json else "quiet" if quiet else "human")
        return command(*args, console=console, **kwargs)

    return wrapper  # type: ignore[return-value]


def registry_options(command: F) -> F:
    """Give a command that speaks to a registry `--plain-http` and `--ca-file`."""
    plain_http = click.option(
        "--plain-http", is_flag=True, help="Speak HTTP without TLS. On loopback that is the default."
    )
    ca_file = click.option(
        "--ca-file",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="PEM file of a CA to trust besides those of the system.",
    )
    return plain_http(ca_file(command))
