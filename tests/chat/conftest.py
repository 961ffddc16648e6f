"""A tokenizer with a chat template, and a speaker that says what it is told, without a model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from gemma_pack.chat.template import Language
from tests.tiny import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from gemma_pack.chat.sampling import Sampling


@dataclass
class Parrot:
    """Says one prepared answer after another and keeps what it was asked; an exception among the tokens is raised."""

    answers: list[list[int | BaseException]]
    asked: list[list[int]] = field(default_factory=list)
    ends: frozenset[int] = frozenset({1})

    def stream(self, ids: Sequence[int], sampling: Sampling, limit: int) -> Iterator[int]:
        del sampling
        self.asked.append(list(ids))
        for token in self.answers.pop(0)[:limit]:
            if isinstance(token, BaseException):
                raise token
            yield token


@pytest.fixture
def gemma2(tmp_path: Path) -> Path:
    """Return a directory with the tiny tokenizer and a template that refuses what Gemma 2's refuses."""
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}), "utf-8")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = (tmp_path / "chat_template.jinja").read_text("utf-8")
    (tmp_path / "chat_template.jinja").write_text(refusal + template, "utf-8")
    return tmp_path


@pytest.fixture
def language(gemma2: Path) -> Language:
    return Language(gemma2)


@pytest.fixture
def tokens(language: Language) -> Callable[[str], list[int]]:
    """Return a function that gives the ids of plain text."""

    def encode(text: str) -> list[int]:
        ids: list[int] = language.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode
