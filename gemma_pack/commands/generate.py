"""`gemma-pack generate`: one answer, or one continuation, streamed; or what each preset gives here."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_pack.commands.options import with_console
from gemma_pack.commands.speaking import load, make_plan, open_checkpoint, speaking_options
from gemma_pack.console import format_bytes, table
from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from gemma_pack.chat.benchmark import Measured
    from gemma_pack.chat.presets import Preset
    from gemma_pack.chat.template import Language, Message
    from gemma_pack.commands.speaking import Opened, Setup
    from gemma_pack.console import Console

CARD_PROMPT = "Write me a poem about Machine Learning."
"""The prompt of the Gemma model card: what --benchmark asks unless told."""
ROUND_CONTEXT = 256


@click.command(
    "generate",
    epilog="""\b
Examples:
  gemma-pack generate demo "The capital of France is" --max-new-tokens 20
  gemma-pack generate gemma-2-9b-it-quantized.w4a16 "Summarize this." < \\
      notes.txt""",
)
@click.argument("model", metavar="DIR|MODEL")
@click.argument("prompt", required=False)
@click.option("--system", metavar="TEXT", help="Instructions before the question; Gemma 2 takes none.")
@click.option(
    "--messages",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help='A whole conversation instead of PROMPT: JSON, [{"role": "user", "content": "…"}, …].',
)
@click.option("--raw", is_flag=True, help="Continue PROMPT as plain text even where there is a chat template.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer in tokens."
)
@click.option("--benchmark", is_flag=True, help="Measure each preset on --max-new-tokens greedy tokens instead.")
@speaking_options
@with_console
def command(
    *,
    prompt: str | None,
    system: str | None,
    messages: Path | None,
    raw: bool,
    max_new_tokens: int,
    benchmark: bool,
    setup: Setup,
    console: Console,
) -> None:
    """Answer PROMPT, or continue it without a chat template.

    What comes through a pipe is appended to PROMPT. The answer is streamed to stdout.

    \b
    Presets:
      auto            exact, memory or memory-extreme: the first that fits
      exact           the weights as they are
      speed           static cache and torch.compile, after two warm-ups
      memory          a variant stays packed; a bf16 base becomes nf4
      memory-extreme  one decoder layer at a time, from host memory or disk
    """
    if messages and (prompt or system or raw):
        raise InvalidUsageError("--messages is a whole conversation", hint="leave out PROMPT, --system and --raw")
    opened = open_checkpoint(setup, console)
    text = _prompt(prompt, needed=messages is None and not benchmark)
    turns = _conversation(text, system, messages)
    ids = _ids(opened.language, turns, text, raw=raw)
    if benchmark:
        _benchmark(setup, opened, ids, max_new_tokens, console)
        return
    from gemma_pack.chat.conversation import Reply
    from gemma_pack.chat.terminal import describe

    needed = -(-(len(ids) + max_new_tokens) // ROUND_CONTEXT) * ROUND_CONTEXT
    speaker = load(setup, opened, console, context=needed)
    reply = Reply(speaker, opened.language, ids, opened.sampling, limit=max_new_tokens)
    for piece in reply:
        console.piece(piece)
    answer = reply.answer
    if answer is None or answer.stopped == "interrupted":
        raise KeyboardInterrupt
    if console.format == "json":
        console.result({**asdict(answer), **asdict(speaker.plan), "seed": setup.seed}, "")
        return
    console.piece("\n")
    console.status(f"({describe(answer)}; seed {setup.seed})")


def _prompt(prompt: str | None, *, needed: bool) -> str:
    """Return the prompt, with what comes through a pipe appended."""
    try:
        piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidUsageError("what comes through the pipe is not UTF-8", hint="iconv -t utf-8") from error
    text = "\n".join(part for part in (prompt, piped.rstrip("\n")) if part)
    if needed and not text:
        raise InvalidUsageError("there is no prompt", hint="pass it as an argument, or through a pipe")
    return text or CARD_PROMPT


def _conversation(text: str, system: str | None, path: Path | None) -> list[Message]:
    """Return the turns of a file, or of the prompt alone.

    Raises:
        InvalidUsageError: the file cannot be read, or is no list of messages.
    """
    from pydantic import TypeAdapter, ValidationError

    from gemma_pack.chat.template import Message

    if path is None:
        return [*([Message("system", system)] if system else []), Message("user", text)]
    hint = 'write it as [{"role": "user", "content": "…"}, …]; roles are system, user and assistant'
    try:
        turns: list[Message] = TypeAdapter(list[Message]).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = f"message {int(first['loc'][0]) + 1}: " if first["loc"] else ""
        raise InvalidUsageError(f"{path} is no conversation: {place}{first['msg']}", hint=hint) from error
    except OSError as error:
        raise InvalidUsageError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    return turns


def _ids(language: Language, turns: list[Message], text: str, *, raw: bool) -> list[int]:
    if raw or (not language.has_template and len(turns) == 1):
        return language.continued(turns[0].content if len(turns) == 1 else text)
    return language.conversation(turns)


def _benchmark(setup: Setup, opened: Opened, ids: list[int], tokens: int, console: Console) -> None:
    from gemma_pack.chat.benchmark import Workload, benchmark

    workload = Workload(directory=opened.checkpoint.directory, ids=tuple(ids), tokens=tokens)
    presets: tuple[Preset, ...] = ("exact", "speed", "memory", "memory-extreme")
    if opened.weights.method:
        presets = ("exact", "speed", "memory") if opened.weights.method == "compressed-tensors" else ("memory",)
    chosen = (setup.preset,) if setup.preset or setup.precision else presets
    context = len(ids) + tokens
    plans = [make_plan(setup, opened, context=context, preset=preset) for preset in chosen]
    measured = benchmark(workload, plans, console)
    data: dict[str, Any] = {
        "prompt_tokens": len(ids),
        "tokens": tokens,
        "device": plans[0].device,
        "presets": [asdict(one) for one in measured],
    }
    shown = table(
        [_row(one, measured[0]) for one in measured if not one.failure],
        header=["preset", "precision", "load", "first token", "tokens/s", "speed-up", "peak memory"],
    )
    console.result(data, f"{len(ids)} tokens read, {tokens} said, on {plans[0].device}\n\n{shown}")
    for one in measured:
        if one.failure:
            console.warn(f"{one.preset}: {one.failure}")


def _row(one: Measured, first: Measured) -> list[str]:
    """Write a line of the table; the speed-up is over the first preset, which is exact unless another was asked for."""
    speed_up = one.tokens_per_second / first.tokens_per_second if first.tokens_per_second else 1.0
    return [
        one.preset,
        one.precision,
        f"{one.load_seconds:.1f} s",
        f"{one.first_token_seconds:.2f} s",
        f"{one.tokens_per_second:.2f}",
        f"{speed_up:.2f} x",
        format_bytes(one.peak_bytes),
    ]
