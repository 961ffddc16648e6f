"""The command line: each verb parses its options, calls one stage and hands the result to the console.

Stages are imported inside the commands, so that `gemma-pack --help` needs neither torch nor pydantic.
The one `except` that turns errors into exit codes is in `main`.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Final

import click

from gemma_pack import __version__
from gemma_pack.console import Console
from gemma_pack.errors import GemmaPackError, MachineError

VERBS: Final[tuple[str, ...]] = (
    "download",
    "recipes",
    "quantize",
    "card",
    "package",
    "push",
)
"""In the order of the work. Each is a module here, with the click command in a variable `command`."""


class _Verbs(click.Group):
    """A group that imports a command's module when it is listed or run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the work, not of the alphabet."""
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a verb; None for an unknown one, which click reports with the closest name."""
        del ctx
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"gemma_pack.commands.{cmd_name}").command
        return command


@click.group(
    cls=_Verbs,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "GEMMA_PACK",
        "max_content_width": 100,
    },
    epilog="""\b
Examples:
  gemma-pack build examples/demo.yaml
  gemma-pack quantize google/gemma-2-9b-it --recipe w4a16""",
)
@click.version_option(__version__, prog_name="gemma-pack")
def cli() -> None:
    """Quantize Gemma, prove what it cost, and ship it as an OCI modelcar.

    \b
    Exit codes: 0 done, 1 operational failure, 2 usage or invalid recipe,
    10 the gate failed, 11 the gate could not decide, 12 this machine cannot,
    13 gated or unauthenticated, 14 not available offline, 130 interrupted.
    Every option can be set by a variable: GEMMA_PACK_<COMMAND>_<OPTION>.
    GEMMA_PACK_DEBUG=1 shows the traceback of an error.
    """


def main() -> None:
    """Run the command line and exit with the code that the error tree assigns."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line on `arguments` and return its exit code."""
    try:
        outcome = cli.main(args=arguments, prog_name="gemma-pack", standalone_mode=False)
    except click.ClickException as error:
        error.show()  # usage: one line of synopsis, then the sentence
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _console(arguments).status("interrupted; finished stages are kept, run the same command again to go on")
        return 130
    except (GemmaPackError, OSError) as error:
        if os.environ.get("GEMMA_PACK_DEBUG"):
            raise
        known = error if isinstance(error, GemmaPackError) else _operating_system_error(error)
        _console(arguments).error(known)
        return known.exit_code
    return outcome if isinstance(outcome, int) else 0


def _operating_system_error(error: OSError) -> GemmaPackError:
    where = f" at {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return MachineError(
            f"no space left on the disk{where}", hint="free some space, or choose another place with -o"
        )
    return GemmaPackError(f"{error.strerror or error}{where}", hint="GEMMA_PACK_DEBUG=1 shows where it happened")


def _console(arguments: list[str]) -> Console:
    """Honour `--format json` for the error even though its command has already unwound."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    as_json = any(a == "--format=json" or (a, b) == ("--format", "json") for a, b in pairs)
    return Console("json" if as_json else "human")
