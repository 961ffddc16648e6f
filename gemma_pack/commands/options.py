"""Options that several commands share, one named decorator each."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gemma_pack.console import Console
from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gemma_pack.oci.base import BaseChoice
    from gemma_pack.oci.manifest import Platform

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


def signing_option(command: F) -> F:
    """Give a command that attaches documents to an image `--sign-key`."""
    return click.option(
        "--sign-key",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="Private key in PEM, ECDSA over P-256, that signs what is attached. GEMMA_PACK_KEY_PASSWORD decrypts it.",
    )(command)


def verifying_option(command: F) -> F:
    """Give a command that reads what is attached to an image `--verify-key`."""
    return click.option(
        "--verify-key",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="Public key in PEM: only what is signed with it counts.",
    )(command)


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


def base_options(command: F) -> F:
    """Give a command that packs a checkpoint `--base` and `--platform`; `chosen_base` reads them."""
    base = click.option(
        "--base",
        default="embedded",
        show_default=True,
        metavar="embedded|none|LAYOUT|REF",
        help="What lies under a modelcar's weights: KServe's own link-and-wait binary, nothing, or an image in a "
        "layout or a registry.",
    )
    platform = click.option(
        "--platform",
        multiple=True,
        metavar="OS/ARCH",
        help="For which platform a modelcar is; may be given several times.  [default: all that the base has]",
    )
    return base(platform(command))


def chosen_base(
    base: str, platform: Sequence[str], *, plain_http: bool = False, ca_file: Path | None = None
) -> BaseChoice:
    """Return what the options of `base_options` ask for; raise InvalidUsageError where one names no platform."""
    from gemma_pack.oci.base import BaseChoice

    platforms = tuple(parse_platform(text) for text in dict.fromkeys(platform))
    return BaseChoice(base, platforms, plain_http=plain_http, ca_file=ca_file)


def platform_option(command: F) -> F:
    """Give a command that reads an image `--platform`; `parse_platform` reads it."""
    return click.option(
        "--platform",
        default="linux/amd64",
        show_default=True,
        metavar="OS/ARCH",
        help="Whose image to read; the checkpoint is the same for all.",
    )(command)


def parse_platform(text: str) -> Platform:
    """Return the platform that `text` names; raise InvalidUsageError where it names none."""
    from gemma_pack.oci.manifest import Platform

    try:
        return Platform.parse(text)
    except ValueError as error:
        raise InvalidUsageError(str(error), hint="--platform linux/amd64") from error
