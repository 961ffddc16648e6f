"""Conversations as ids: the text that the model card shows, one <bos>, and refusals in a sentence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from gemma_pack.chat.template import Language, Message
from gemma_pack.errors import CheckpointError, InvalidUsageError
from tests.tiny import write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

HELLO = Message("user", "Write a hello world program")
BOS = 2


def test_the_example_of_the_model_card_is_rendered_as_it_stands_there(language: Language) -> None:
    expected = "<bos><start_of_turn>user\nWrite a hello world program<end_of_turn>\n<start_of_turn>model\n"
    assert language.render([HELLO]) == expected


def test_every_turn_is_there_and_the_models_are_called_model(language: Language) -> None:
    text = language.render([Message("user", "a"), Message("assistant", " b "), Message("user", "c")])
    turns = "user\na", "model\nb", "user\nc"
    assert (
        text == "<bos>" + "".join(f"<start_of_turn>{turn}<end_of_turn>\n" for turn in turns) + "<start_of_turn>model\n"
    )


@pytest.mark.parametrize("content", ["Why?", "<bos>Why?", "a <bos> in the middle"])
def test_ids_begin_with_the_only_bos(language: Language, content: str) -> None:
    for ids in (language.conversation([Message("user", content)]), language.continued(content)):
        assert ids[0] == BOS
        assert ids.count(BOS) == 1


def test_ids_are_those_of_transformers(gemma2: Path, language: Language) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(gemma2), local_files_only=True)
    turns = [{"role": "user", "content": HELLO.content}]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert language.conversation([HELLO]) == list(ids)


def test_a_system_message_on_gemma_2_is_explained(language: Language) -> None:
    with pytest.raises(InvalidUsageError) as refusal:
        language.render([Message("system", "Be brief."), HELLO])
    assert refusal.value.message == "Gemma 2 has no system role: its chat template says 'System role not supported'"
    assert refusal.value.hint == "put the instructions at the head of the first question"


@pytest.mark.parametrize(
    ("roles", "sentence"),
    [
        (["user", "user"], "message 2 of the conversation is by user, and the turn is assistant's"),
        (["assistant", "user"], "message 1 of the conversation is by assistant, and the turn is user's"),
        (["system", "assistant"], "message 2 of the conversation is by assistant, and the turn is user's"),
        (["user", "assistant", "system"], "message 3 of the conversation is by system, and the turn is user's"),
        (["user", "assistant"], "the conversation does not end with a question"),
        ([], "the conversation does not end with a question"),
        (["system"], "the conversation does not end with a question"),
    ],
)
def test_turns_out_of_order_are_explained(language: Language, roles: list[str], sentence: str) -> None:
    with pytest.raises(InvalidUsageError) as refusal:
        language.render([Message(role, "text") for role in roles])  # type: ignore[arg-type]
    assert refusal.value.message == sentence


def test_a_refusal_that_we_do_not_know_is_passed_on(gemma2: Path) -> None:
    (gemma2 / "chat_template.jinja").write_text("{{ raise_exception('no questions today') }}", "utf-8")
    with pytest.raises(InvalidUsageError, match="the chat template refuses the conversation: no questions today"):
        Language(gemma2).render([HELLO])


@pytest.mark.parametrize("template", ["{% for %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_a_template_that_is_broken_or_reaches_for_more_is_refused(gemma2: Path, template: str) -> None:
    (gemma2 / "chat_template.jinja").write_text(template, "utf-8")
    with pytest.raises(InvalidUsageError, match="the chat template refuses the conversation"):
        Language(gemma2).render([HELLO])


def test_a_base_model_has_no_turns_to_take(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    language = Language(tmp_path)
    assert not language.has_template
    with pytest.raises(InvalidUsageError, match="this model has no chat template"):
        language.render([HELLO])
    assert language.continued("the weight")[0] == BOS


def test_a_template_inside_the_tokenizers_config_counts(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").rename(tmp_path / "template")
    path = tmp_path / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "bos_token": {"content": "<bos>"}}
    path.write_text(json.dumps({**config, "chat_template": (tmp_path / "template").read_text()}))
    assert Language(tmp_path).render([HELLO]).startswith("<bos><start_of_turn>user")


def test_without_a_tokenizer_nothing_is_asked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Language(tmp_path)


def test_letters_of_several_bytes_come_whole(language: Language) -> None:
    said = "the weight ist für 日本 🙂 model"
    ids = language.tokenizer.encode(said, add_special_tokens=False).ids
    pieces = list(language.pieces(ids))
    assert "".join(pieces) == said
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)
