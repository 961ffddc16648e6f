from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from gemma_pack.sources.gguf_tokenizer import PieceType, Vocabulary, merges, tokenizer_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def vocabulary(normal: dict[str, float], user_defined: list[str] | None = None) -> Vocabulary:
    user_defined = user_defined or []
    return Vocabulary(
        [*CONTROL, *user_defined, *BYTES, *normal],
        [*[-1000.0] * (len(CONTROL) + len(user_defined)), *[0.0] * 256, *normal.values()],
        [
            *[PieceType.CONTROL] * len(CONTROL),
            *[PieceType.USER_DEFINED] * len(user_defined),
            *[PieceType.BYTE] * 256,
            *[PieceType.NORMAL] * len(normal),
        ],
    )


def tokenizer(given: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(tokenizer_json(given)))


def test_each_split_into_two_pieces_is_a_merge_and_the_better_score_goes_first():
    given = vocabulary({"bc": -1.0, "ab": -2.0, "abc": -3.0, "a": -10.0, "b": -11.0, "c": -12.0})
    assert merges(given) == [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")][:2] + sorted(
        [("ab", "c"), ("a", "bc")], key=lambda pair: given.pieces.index(pair[0])
    )


def test_user_defined_pieces_rank_first_and_bytes_and_control_pieces_not_at_all():
    given = vocabulary({"▁a": -0.0, "▁": -5.0, "a": -6.0, "<": -7.0, "pad>": -8.0}, ["  ", "   "])
    pairs = merges(given)
    assert pairs[0] == ("▁", "▁")
    assert pairs[-1] == ("▁", "a")
    assert ("<", "pad>") not in pairs


def test_the_best_pair_wins_over_the_first():
    given = vocabulary({"bc": -1.0, "ab": -2.0, "a": -10.0, "b": -11.0, "c": -12.0})
    assert tokenizer(given).encode("abc", add_special_tokens=False).tokens == ["a", "bc"]


@pytest.mark.parametrize("text", ["a  b", "   a", "é", "a\n\nb", "", "<b>", "▁"])
def test_what_is_encoded_is_decoded_and_begins_with_one_bos(text: str):
    given = vocabulary({"▁a": -1.0, "▁": -2.0, "a": -3.0, "b": -4.0}, ["  ", "   ", "\n", "\n\n", "<b>"])
    built = tokenizer(given)
    encoded = built.encode(text)
    assert encoded.ids[0] == 2
    assert encoded.ids.count(2) == 1
    assert built.decode(encoded.ids) == text.replace("▁", " ")


def test_only_control_pieces_are_special():
    built = tokenizer(vocabulary({"a": -1.0}, ["<b>"]))
    ids = built.encode("<b>a<eos>", add_special_tokens=False).ids
    assert built.decode(ids) == "<b>a"
    assert built.decode(ids, skip_special_tokens=False) == "<b>a<eos>"


def test_a_pair_of_texts_has_a_bos_each():
    assert tokenizer(vocabulary({"a": -1.0})).encode("a", "a").tokens == ["<bos>", "a", "<bos>", "a"]
