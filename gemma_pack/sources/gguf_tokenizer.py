"""Rebuild Gemma's tokenizer.json from the vocabulary inside a GGUF.

A GGUF keeps what SentencePiece knows (pieces, scores, types) and drops what the `tokenizers` library needs: the
merges of a BPE model. They follow from the vocabulary: SentencePiece joins the adjacent pair whose union has the
best score, so each split of a piece into two pieces is a merge, and the better the score the earlier it ranks.

Sources: sentencepiece `src/bpe_model.cc` (the pair of best score first) and `sentencepiece_model.proto` (piece types);
llama.cpp `convert_hf_to_gguf.py` (how the pieces got into the GGUF); the shape of the published Gemma tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

SPACE: Final = "▁"
"""SentencePiece writes a space as U+2581."""


class PieceType(IntEnum):
    """`ModelProto.SentencePiece.Type` of sentencepiece_model.proto."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The pieces of a SentencePiece BPE model; a piece's place in the lists is its token id."""

    pieces: list[str]
    scores: list[float]
    types: list[int]

    def __post_init__(self) -> None:
        """Spell runs of spaces as SentencePiece does: llama.cpp's converter writes them as plain spaces."""
        object.__setattr__(self, "pieces", [piece.replace(" ", SPACE) for piece in self.pieces])


def merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the merges of the BPE model, first rank first.

    User-defined pieces rank before all others because SentencePiece never splits them; then the higher score of the
    union decides, then the ids of the two parts.
    """
    ids = {piece: index for index, piece in enumerate(vocabulary.pieces)}
    ranked: list[tuple[tuple[bool, float, int, int, int], tuple[str, str]]] = []
    for index, (piece, score, kind) in enumerate(
        zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True)
    ):
        if kind not in (PieceType.NORMAL, PieceType.USER_DEFINED):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                rank = (kind == PieceType.NORMAL, -score, index, ids[left], ids[right])
                ranked.append((rank, (left, right)))
    ranked.sort()
    return [pair for _, pair in ranked]


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of tokenizer.json: BPE with byte fallback, and <bos> before every text."""
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == PieceType.CONTROL,
            }
            for index, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True))
            if kind in (PieceType.CONTROL, PieceType.USER_DEFINED)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<bos>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                "<bos>": {"id": "<bos>", "ids": [vocabulary.pieces.index("<bos>")], "tokens": ["<bos>"]}
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(vocabulary.pieces)},
            "merges": merges(vocabulary),
        },
    }
