"""A conversation: what the model is asked, what is remembered, and what Ctrl-C leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_pack.chat.conversation import Conversation, Reply
from gemma_pack.chat.sampling import GREEDY
from gemma_pack.chat.template import Message
from tests.chat.conftest import Parrot

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma_pack.chat.template import Language

    Encode = Callable[[str], list[int]]

END = 6
"""<end_of_turn> in the tiny vocabulary."""


def conversation(language: Language, *answers: list[int | BaseException]) -> tuple[Conversation, Parrot]:
    parrot = Parrot(list(answers))
    return Conversation(parrot, language, GREEDY, limit=50), parrot


def test_the_second_question_brings_the_first_along(language: Language, tokens: Encode) -> None:
    talk, parrot = conversation(language, [*tokens("by the model"), END], [*tokens("not that"), END])
    assert "".join(talk.ask("the weight")) == "by the model"
    assert "".join(talk.ask("and the scale")) == "not that"
    expected = [Message("user", "the weight"), Message("assistant", "by the model"), Message("user", "and the scale")]
    assert parrot.asked[1] == language.conversation(expected)
    assert talk.messages == [*expected, Message("assistant", "not that")]


def test_what_was_read_is_a_prefix_of_what_comes_next(language: Language, tokens: Encode) -> None:
    # so that a KV cache of the first answer serves the second
    first = [*tokens("by the model"), END]
    talk, parrot = conversation(language, first, [END])
    for _ in range(2):
        list(talk.ask("the weight"))
    read = [*parrot.asked[0], *first]
    assert parrot.asked[1][: len(read)] == read


def test_a_new_session_forgets_all_but_the_system_message(language: Language) -> None:
    talk = Conversation(Parrot([]), language, GREEDY, limit=5, system="Be brief.")
    talk.messages += [Message("user", "a"), Message("assistant", "b")]
    talk.forget()
    assert talk.messages == [Message("system", "Be brief.")]


def test_the_end_token_is_counted_and_not_shown(language: Language, tokens: Encode) -> None:
    said = tokens("the model")
    for end in (END, 1):
        reply = Reply(Parrot([[*said, end, *said]]), language, [2, 3], GREEDY, limit=50)
        assert "".join(reply) == "the model"
        assert reply.answer
        assert (reply.answer.tokens, reply.answer.prompt_tokens, reply.answer.stopped) == (len(said) + 1, 2, "end")
        assert reply.answer.first_token_seconds is not None
        assert reply.answer.tokens_per_second is not None


def test_the_limit_is_said(language: Language, tokens: Encode) -> None:
    reply = Reply(Parrot([tokens("the model is the model")]), language, [2], GREEDY, limit=2)
    list(reply)
    assert reply.answer
    assert (reply.answer.tokens, reply.answer.stopped) == (2, "length")


def test_ctrl_c_keeps_what_was_said(language: Language, tokens: Encode) -> None:
    talk, _ = conversation(language, [*tokens("by the"), KeyboardInterrupt()])
    assert "".join(talk.ask("the weight")) == "by the"
    assert talk.reply.answer
    assert talk.reply.answer.stopped == "interrupted"
    assert talk.messages == [Message("user", "the weight"), Message("assistant", "by the")]


def test_ctrl_c_before_the_first_word_takes_the_question_back(language: Language) -> None:
    talk, _ = conversation(language, [KeyboardInterrupt()])
    assert list(talk.ask("the weight")) == []
    assert talk.messages == []


def test_an_answer_that_nobody_listens_to_is_kept_as_far_as_it_went(language: Language, tokens: Encode) -> None:
    talk, _ = conversation(language, [*tokens("by the model"), END])
    pieces = talk.ask("the weight")
    first = next(pieces)
    pieces.close()
    assert talk.messages[-1] == Message("assistant", first)
    assert talk.reply.answer
    assert talk.reply.answer.stopped == "interrupted"
