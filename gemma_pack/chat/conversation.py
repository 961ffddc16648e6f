"""A conversation with a model, turn by turn, and the figures of each answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from gemma_pack.chat.template import Message

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from gemma_pack.chat.sampling import Sampling
    from gemma_pack.chat.template import Language

Stop = Literal["end", "length", "interrupted"]


class Speaker(Protocol):
    """What says one token after another; `SpokenModel` is one, tests may pass their own."""

    ends: frozenset[int]

    def stream(self, ids: Sequence[int], sampling: Sampling, limit: int) -> Iterator[int]:
        """Yield at most `limit` tokens that continue `ids`, an end token included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer and what it took.

    Attributes:
        text: without the end token.
        prompt_tokens: of the whole conversation before it.
        tokens: that were drawn, an end token included.
        first_token_seconds: from the question to the first token; None where there was none.
        tokens_per_second: after the first token; None where there were fewer than two.
        stopped: because the model ended its turn, at the limit, or by Ctrl-C.
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_token_seconds: float | None
    tokens_per_second: float | None
    stopped: Stop


@dataclass(slots=True)
class Clock:
    """Counts tokens as they pass, and when."""

    begin_s: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    last_s: float = 0.0
    tokens: int = 0
    ended: bool = False

    def watch(self, tokens: Iterator[int], ends: frozenset[int]) -> Iterator[int]:
        """Pass tokens on, but for the one that ends the answer."""
        for token in tokens:
            self.last_s = time.perf_counter()
            self.first_s = self.first_s or self.last_s
            self.tokens += 1
            if token in ends:
                self.ended = True
                return
            yield token

    @property
    def first_token_seconds(self) -> float | None:
        """From the beginning to the first token; None where there was none."""
        return None if self.first_s is None else self.first_s - self.begin_s

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None where there were fewer than two."""
        if self.first_s is None or self.last_s <= self.first_s:
            return None
        return (self.tokens - 1) / (self.last_s - self.first_s)


class Reply:
    """An answer while it is being said: iterate over its pieces of text; `answer` then holds the whole."""

    def __init__(
        self, speaker: Speaker, language: Language, ids: Sequence[int], sampling: Sampling, *, limit: int
    ) -> None:
        """Ask `speaker` to continue `ids` by at most `limit` tokens."""
        self._speaker, self._language, self._ids = speaker, language, list(ids)
        self._sampling, self._limit = sampling, limit
        self.answer: Answer | None = None

    def __iter__(self) -> Generator[str]:
        """Yield pieces of text as they come; Ctrl-C, or closing it, ends the answer with what was said."""
        ends = self._speaker.ends | self._language.ends()
        clock = Clock()
        said: list[str] = []
        interrupted = False
        tokens = clock.watch(self._speaker.stream(self._ids, self._sampling, self._limit), ends)
        try:
            for piece in self._language.pieces(tokens):
                said.append(piece)
                yield piece
        except (KeyboardInterrupt, GeneratorExit):
            interrupted = True
        finally:
            self.answer = self._summary("".join(said), clock, interrupted=interrupted)

    def _summary(self, text: str, clock: Clock, *, interrupted: bool) -> Answer:
        return Answer(
            text=text,
            prompt_tokens=len(self._ids),
            tokens=clock.tokens,
            first_token_seconds=clock.first_token_seconds,
            tokens_per_second=clock.tokens_per_second,
            stopped="interrupted" if interrupted else "end" if clock.ended else "length",
        )


class Conversation:
    """Questions and answers so far, with a system message at the head where there is one."""

    def __init__(
        self, speaker: Speaker, language: Language, sampling: Sampling, *, limit: int, system: str | None = None
    ) -> None:
        """Begin one whose answers have at most `limit` tokens."""
        self._speaker, self._language, self._sampling, self._limit = speaker, language, sampling, limit
        self._system = [Message("system", system)] if system else []
        self.messages: list[Message] = list(self._system)

    def forget(self) -> None:
        """Begin a new session: only the system message remains."""
        self.messages = list(self._system)

    def ask(self, question: str) -> Generator[str]:
        """Yield the pieces of the answer to `question`; then question and answer belong to the conversation.

        An answer that was interrupted counts as far as it was said; one that never began takes its question with it.

        Raises:
            InvalidUsageError: the template refuses the conversation, or it no longer fits into the context.
        """
        asked = [*self.messages, Message("user", question)]
        ids = self._language.conversation(asked)
        self.reply = Reply(self._speaker, self._language, ids, self._sampling, limit=self._limit)
        try:
            yield from self.reply
        finally:
            if self.reply.answer and self.reply.answer.text:
                self.messages = [*asked, Message("assistant", self.reply.answer.text)]
