"""`gemma-pack chat`: a conversation with a model, at a terminal or through a pipe."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import with_console
from gemma_pack.commands.speaking import speaking_options

if TYPE_CHECKING:
    from gemma_pack.commands.speaking import Setup
    from gemma_pack.console import Console


@click.command(
    "chat",
    epilog="""\b
Examples:
  gemma-pack chat gemma-2-9b-it-quantized.w4a16
  gemma-pack chat google/gemma-3-1b-it --preset memory --mode factual \\
      --system "Answer in one sentence." """.rstrip(),
)
@click.argument("model", metavar="DIR|MODEL")
@click.option("--system", metavar="TEXT", help="Instructions for the whole conversation; Gemma 2 takes none.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Longest answer in tokens."
)
@speaking_options
@with_console
def command(*, system: str | None, max_new_tokens: int, setup: Setup, console: Console) -> None:
    """Talk with an instruction-tuned model, or a variant of one.

    Answers appear as they are said. Ctrl-C stops an answer, Ctrl-D or !exit leaves, `!new session` forgets what was
    said; !help lists all. A line that ends with a backslash goes on in the next, as do lines between triple quotes.
    From a pipe each line is a question, and only the answers are printed; with --format json each is a line of JSON.

    \b
    Presets:
      auto            exact, memory or memory-extreme: the first that fits
      exact           the weights as they are
      speed           static cache and torch.compile, after two warm-ups
      memory          a variant stays packed; a bf16 base becomes nf4
      memory-extreme  one decoder layer at a time, from host memory or disk
    """
    from gemma_pack.chat.conversation import Conversation
    from gemma_pack.chat.template import Message
    from gemma_pack.chat.terminal import converse
    from gemma_pack.commands.speaking import load, open_checkpoint
    from gemma_pack.sources import cache_directory

    opened = open_checkpoint(setup, console)
    head = [Message("system", system)] if system else []
    opened.language.conversation([*head, Message("user", "")])  # refuses before gigabytes are loaded for nothing
    speaker = load(setup, opened, console)
    interactive = sys.stdin.isatty()
    if interactive:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends the program, where Ctrl-C ends only an answer
        console.status("ask; !help says what else you can do here")
    conversation = Conversation(speaker, opened.language, opened.sampling, limit=max_new_tokens, system=system)
    converse(conversation, console, interactive=interactive, history=cache_directory() / "questions")
