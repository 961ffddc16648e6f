"""The fixed prompts that base and variant answer side by side, plain and in the chat template.

They are short, plain and of many kinds, so that an answer shows at a glance whether the model still speaks: facts,
lists, code, arithmetic, other languages. Where more are wanted, openings of the evaluation text follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gemma_pack.evaluation.comparable import chat_template
from gemma_pack.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    from tokenizers import Tokenizer

OPENINGS: Final = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 2, 4, 8, 16,",
    "Die Hauptstadt von Deutschland ist",
    "Photosynthesis is the process by which",
    "SELECT name, COUNT(*) FROM orders",
    "La révolution française a commencé en",
    "To make a cup of tea, first",
)
QUESTIONS: Final = (
    "Why is the sky blue?",
    "Name three planets of the solar system.",
    "What is 17 times 6?",
    "Write a Python function that reverses a string.",
    "Translate into French: The train leaves at noon.",
    "Give me a short recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Explain in one sentence what a database index does.",
    "List the seasons of the year.",
    "Is 91 a prime number?",
    "¿Cuál es la capital de España?",
    "Write a haiku about autumn.",
)
OPENING_TOKENS: Final = 32
"""Tokens of the evaluation text, <bos> included, that make a prompt."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text and as token ids, which start with exactly one <bos>."""

    text: str
    ids: tuple[int, ...]
    templated: bool


def build_prompts(directory: Path, count: int, windows: npt.NDArray[np.int32]) -> list[Prompt]:
    """Return `count` prompts, fewer only where the evaluation text runs out.

    With a chat template, questions and openings take turns. `directory` holds the tokenizer, `windows` is int32
    [windows, sequence_length].
    """
    tokenizer, bos = load_tokenizer(directory)
    plain = [_plain(tokenizer, bos, text) for text in OPENINGS]
    if chat_template(directory):
        questions = _templated(directory, tokenizer, bos)
        fixed = [prompt for pair in zip(questions, plain, strict=True) for prompt in pair]
    else:
        fixed = plain
    wanted = max(0, count - len(fixed))
    continued = [tuple(int(token) for token in row[:OPENING_TOKENS]) for row in windows[:wanted]]
    openings = [Prompt(tokenizer.decode(list(ids[1:])), ids, templated=False) for ids in continued]
    return [*fixed[:count], *openings]


def _plain(tokenizer: Tokenizer, bos: int, text: str) -> Prompt:
    return Prompt(text, (bos, *tokenizer.encode(text, add_special_tokens=False).ids), templated=False)


def _templated(directory: Path, tokenizer: Tokenizer, bos: int) -> list[Prompt]:
    """Render the questions by the chat template, which writes <bos> itself."""
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    prompts = []
    for question in QUESTIONS:
        text = template.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = [token for token in tokenizer.encode(text, add_special_tokens=False).ids if token != bos]
        prompts.append(Prompt(question, (bos, *ids), templated=True))
    return prompts
