"""A conversation as the token ids that the model was trained on: its chat template, one <bos>, errors in a sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from gemma_pack.checkpoint import read_json
from gemma_pack.errors import InvalidUsageError
from gemma_pack.gemma import require_gemma
from gemma_pack.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

Role = Literal["system", "user", "assistant"]
END_OF_TURN: Final = ("<end_of_turn>", "<turn|>")
"""What ends a turn, in Gemma 2 and 3, and in Gemma 4."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str


class Language:
    """The tokenizer of a checkpoint and, where it has one, its chat template."""

    def __init__(self, directory: Path) -> None:
        """Read both from `directory`.

        Raises:
            CheckpointError: there is no tokenizer.json, or it is broken.
        """
        self.tokenizer: Tokenizer
        self.tokenizer, self._bos = load_tokenizer(directory)
        self._directory = directory
        path = directory / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        self._template = _find_template(directory, config)
        self._special_tokens = {key: _text(config.get(key)) for key in ("bos_token", "eos_token")}

    @property
    def has_template(self) -> bool:
        """Whether the model was trained to answer in turns."""
        return self._template is not None

    def continued(self, text: str) -> list[int]:
        """Return the ids of plain text that a model is to continue: one <bos>, and the text."""
        return [self._bos, *self._without_bos(text)]

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that ask for the next answer: one <bos>, every turn, and the opening of the model's.

        Raises:
            InvalidUsageError: there is no template, the turns are out of order, or the template refuses them.
        """
        return [self._bos, *self._without_bos(self.render(messages))]

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text that the chat template makes of a conversation, <bos> included."""
        from jinja2 import TemplateError

        if self._template is None:
            raise InvalidUsageError(
                "this model has no chat template: it was trained to continue text, not to answer",
                hint="use gemma-pack generate, or the instruction-tuned model, whose name ends with -it",
            )
        require_turns(messages)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return _render(self._template, messages=turns, add_generation_prompt=True, **self._special_tokens)
        except TemplateError as error:
            raise self._refused(messages, str(error)) from error

    def ends(self) -> frozenset[int]:
        """Return the ids that end a turn."""
        found = (self.tokenizer.token_to_id(token) for token in END_OF_TURN)
        return frozenset(token for token in found if token is not None)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of tokens as they come; a letter of several bytes when its last byte is there."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        for token in tokens:
            if piece := stream.step(self.tokenizer, token):
                yield piece

    def _without_bos(self, text: str) -> list[int]:
        """Drop every <bos>, the template's own and one that a user typed."""
        return [token for token in self.tokenizer.encode(text, add_special_tokens=False).ids if token != self._bos]

    def _refused(self, messages: Sequence[Message], reason: str) -> InvalidUsageError:
        if messages[0].role == "system":
            family = require_gemma(read_json(self._directory / "config.json")).name
            return InvalidUsageError(
                f"{family} has no system role: its chat template says {reason!r}",
                hint="put the instructions at the head of the first question",
            )
        return InvalidUsageError(
            f"the chat template refuses the conversation: {reason}", hint="see chat_template.jinja of the model"
        )


def require_turns(messages: Sequence[Message]) -> None:
    """Raise InvalidUsageError unless questions and answers take turns, the last one a question.

    A system message may stand at the head.
    """
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message.role != expected:
            place = number + 1 + len(messages) - len(turns)
            raise InvalidUsageError(
                f"message {place} of the conversation is by {message.role}, and the turn is {expected}'s",
                hint="user and assistant take turns, beginning with user; a system message comes first",
            )
    if not turns or turns[-1].role != "user":
        raise InvalidUsageError(
            "the conversation does not end with a question", hint="its last message must be by user"
        )


def _render(template: str, **values: Any) -> str:  # noqa: ANN401 - what templates may ask for
    """Render a chat template in the environment that transformers gives it (`_compile_jinja_template`).

    The sandbox keeps a stranger's template from the attributes of Python's objects.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(reason: str) -> None:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        autoescape=False,
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(**values)


def _find_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template: a file of its own, else what tokenizer_config.json holds."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _text(token: object) -> str:
    """Return a special token of tokenizer_config.json, which writes it as text or as a mapping with `content`."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
