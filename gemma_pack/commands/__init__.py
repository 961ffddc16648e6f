"""The command line: each verb parses its options, calls one stage and hands the result to the console.

Stages are imported inside the commands, so that `gemma-pack --help` needs neither torch nor pydantic.
The one `except` that turns errors into exit codes is in `main`.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from typing import Final

import click

from gemma_pack import __version__
from gemma_pack.console import Console
from gemma_pack.disk import cache_error
from gemma_pack.errors import GemmaPackError, InvalidUsageError, known_error
from gemma_pack.no_proxy import leave_out_ipv6_networks

VERBS: Final[tuple[str, ...]] = (
    "download",
    "recipes",
    "plan",
    "quantize",
    "validate",
    "report",
    "card",
    "package",
    "push",
    "pull",
    "inspect",
    "verify",
    "referrers",
    "deploy",
    "serve",
    "generate",
    "chat",
    "build",
    "doctor",
)
"""In the order of the work. Each is a module here, with the click command in a variable `command`."""

INTERRUPTED: Final = 130
"""128 and the number of SIGINT, as shells have it."""


class _Verbs(click.Group):
    """A group that imports a command's module when it is listed or run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the work, not of the alphabet."""
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a verb; None for an unknown one."""
        del ctx
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"gemma_pack.commands.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command that was called; keep from click what it would answer by an empty line of its own.

        That line, on stderr, would be no JSON. And what ended of itself was interrupted by nobody.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error
        except EOFError as error:
            reason = str(error) or "something ended before all of it was read"
            raise GemmaPackError(reason, hint="GEMMA_PACK_DEBUG=1 shows where it happened") from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that `args` begin with; name the closest one for a command that there is not."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0].lower(), VERBS, n=1)
            hint = f"did you mean gemma-pack {close[0]}?" if close else "gemma-pack --help lists the commands"
            raise InvalidUsageError(f"there is no command {args[0]}", hint=hint)
        return super().resolve_command(ctx, args)


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
    13 gated or unauthenticated, 14 not available offline,
    15 no consumer could use the image, 130 interrupted.
    Every option can be set by a variable: GEMMA_PACK_<COMMAND>_<OPTION>.
    GEMMA_PACK_DEBUG=1 shows the traceback of an error.
    """


def main() -> None:
    """Run the command line and exit with the code that the error tree assigns."""
    # torch's threads wait without spinning: with two cores shared by others, as CI often has it, a forward pass of
    # 2048 tokens of Gemma 3 270M took 2.5 to 7.5 s so, and 12 to 18 s with the default
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    leave_out_ipv6_networks()  # before anything makes a client of httpx, the hub's library included
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cancelled CI job cleans up as Ctrl-C does
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # so does a closed terminal, unless nohup has it ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a Latin-1 terminal shows a ? where it lacks the letter
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line on `arguments` and return its exit code."""
    try:
        outcome = cli.main(args=arguments, prog_name="gemma-pack", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _console(arguments).interrupted(INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        known = _known_error(error)
        if known is None:
            raise
        if os.environ.get("GEMMA_PACK_DEBUG"):
            import traceback

            traceback.print_exc()
        _console(arguments).error(known)
        return known.exit_code
    return outcome if isinstance(outcome, int) else 0


def _known_error(error: Exception) -> GemmaPackError | None:
    if isinstance(error, click.UsageError):
        hint = f"{error.ctx.command_path} --help says how" if error.ctx else None
        return InvalidUsageError(" ".join(error.format_message().split()), hint=hint)
    if isinstance(error, click.ClickException):
        return GemmaPackError(error.format_message())
    return cache_error(error) or known_error(error)


def _console(arguments: list[str]) -> Console:
    """Honour `--format json`, or its variable, for the error even though its command has unwound or never begun."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    given = [b if a == "--format" else a.removeprefix("--format=") for a, b in pairs if a.startswith("--format")]
    verbs = [argument.replace("-", "_") for argument in arguments if not argument.startswith("-")]
    variables = ("_".join(("GEMMA_PACK", *verbs[:depth], "FORMAT")).upper() for depth in (1, 2))
    given += [os.environ[name] for name in variables if name in os.environ]
    return Console("json" if given[:1] == ["json"] else "human")
