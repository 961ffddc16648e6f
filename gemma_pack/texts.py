"""Calibration and evaluation text, cut into windows of token ids that each start with exactly one <bos>.

A text is `builtin` (the prose of the running Python's documentation topics), `wikitext2`, a .txt or .jsonl file, or a
hub dataset. Prose is joined by blank lines, tokenised once without special tokens, cut into disjoint windows of
`sequence_length - 1` tokens, and <bos> is put before each: Gemma's likelihood is meaningless without it. Chats
are rendered by the model's own template, which already writes <bos>, and packed one after the other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final

import numpy as np

from gemma_pack import wikitext2
from gemma_pack.errors import TextError
from gemma_pack.record import TextRecord
from gemma_pack.text_sources import Chats, Prose, open_text
from gemma_pack.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from gemma_pack.console import Reporter
    from gemma_pack.text_sources import Purpose

PROSE_CHARACTERS: Final = 16 << 20
"""Prose is read up to here, or to 16 characters for each token asked for if that is more, so that windows can be
drawn from all over a corpus of ordinary size, and one of any size stays within memory."""

GPTQ_TOKENS: Final = 2048
"""Of a window of `load_gptq_windows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows of one text.

    `ids` is int32 [windows, sequence_length]; each row starts with <bos> and holds no other. `text_bytes` is
    int64 [windows]: UTF-8 bytes of the text behind each row, for bits per byte. `asked` is how many windows were
    wanted; `record.windows` is how many there are.
    """

    ids: npt.NDArray[np.int32]
    text_bytes: npt.NDArray[np.int64]
    record: TextRecord
    asked: int


def load_windows(
    spec: str,
    purpose: Purpose,
    tokenizer: Path,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    split: str = "train",
    offline: bool = False,
    reporter: Reporter | None = None,
) -> Windows:
    """Return up to `samples` windows of `sequence_length` tokens from the text `spec`.

    Where the text has more, the seed picks which; of one text and seed, fewer windows are a subset of more.
    `tokenizer` is the checkpoint directory that holds tokenizer.json. `split` is of a hub dataset.

    Raises:
        TextError: there is no such text, it cannot be read, or it does not fill one window.
        OfflineError: a hub dataset is out of reach and not in the cache.
        AccessError: a hub dataset is gated or private.
        CheckpointError: the tokenizer is missing or has no <bos>.
    """
    text = open_text(spec, purpose, split=split, offline=offline, reporter=reporter)
    encode = _Encoder(tokenizer)
    wanted = samples * (sequence_length - 1)
    if isinstance(text, Chats):
        ids, sizes = encode.chats(text, wanted, seed)
    else:
        ids, sizes = encode.prose(_joined(text, max(PROSE_CHARACTERS, 16 * wanted)))
    windows, text_bytes = _cut(ids, sizes, encode.bos, samples=samples, sequence_length=sequence_length, seed=seed)
    if len(windows) == 0:
        raise TextError(
            f"{text.origin} holds no text" if len(ids) == 0 else
            f"{text.origin} holds {len(ids)} tokens, too few for one window of {sequence_length}",
            hint="choose a longer text, or a shorter sequence length",
        )  # fmt: skip
    if reporter and len(windows) < samples:
        reporter.warn(
            f"{text.origin} fills {len(windows)} windows of {sequence_length} tokens, not the {samples} asked for"
        )
    digest = hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()
    record = TextRecord(
        spec=text.origin, sha256=digest, windows=len(windows), sequence_length=sequence_length, seed=seed
    )
    return Windows(ids=windows, text_bytes=text_bytes, record=record, asked=samples)


def load_gptq_windows(tokenizer: Path, *, offline: bool = False) -> Windows:
    """Return WikiText-2's test split as GPTQ's code cuts it, for figures to hold beside those of papers.

    The whole text is tokenised once, with <bos> at its very beginning and nowhere else, and cut into disjoint windows
    of 2048 tokens; the tail is dropped (github.com/IST-DASLab/gptq, llama.py, `llama_eval`, and datautils.py). A Gemma
    reads every window but the first without its <bos>, so these perplexities are far above those of `load_windows`.

    Raises:
        OfflineError, TextError: see `read_wikitext2`.
        CheckpointError: the tokenizer is missing or has no <bos>.
    """
    encode = _Encoder(tokenizer)
    ids, sizes = encode.prose("\n\n".join(wikitext2.read_wikitext2(offline=offline)))
    ids, sizes = np.insert(ids, 0, encode.bos), np.insert(sizes, 0, 0)
    count = len(ids) // GPTQ_TOKENS
    shape = (count, GPTQ_TOKENS)
    windows = ids[: count * GPTQ_TOKENS].reshape(shape)
    record = TextRecord(
        spec=wikitext2.ORIGIN,
        sha256=hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
        windows=count,
        sequence_length=GPTQ_TOKENS,
        seed=0,
    )
    text_bytes = sizes[: count * GPTQ_TOKENS].reshape(shape)[:, 1:].sum(axis=1)
    return Windows(ids=windows, text_bytes=text_bytes, record=record, asked=count)


def _joined(prose: Prose, limit: int) -> str:
    """Join pieces by blank lines until `limit` characters are there."""
    kept: list[str] = []
    size = 0
    for piece in prose.pieces:
        kept.append(piece)
        size += len(piece) + 2
        if size >= limit:
            break
    return "\n\n".join(kept)[:limit]


class _Encoder:
    """Turns text into token ids without <bos>, and knows how many bytes of the text stand behind each."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer, self.bos = load_tokenizer(directory)
        self._directory = directory

    def prose(self, text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return ids (int32) and bytes (int64) of each token; a special token spelled out in `text` is plain text."""
        self._tokenizer.encode_special_tokens = True
        return self._encode(text)

    def chats(self, chats: Chats, wanted: int, seed: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return ids and bytes of conversations, drawn by the seed until `wanted` tokens are there."""
        from jinja2 import TemplateError
        from transformers import AutoTokenizer

        template = AutoTokenizer.from_pretrained(str(self._directory))
        if not template.chat_template:
            raise TextError(
                f"{chats.origin} holds chats, and the tokenizer in {self._directory} has no chat template",
                hint="use plain text, or an instruction-tuned model",
            )
        self._tokenizer.encode_special_tokens = False
        parts = []
        total = 0
        for index in np.random.default_rng(seed).permutation(len(chats.rows)):
            try:
                rendered = template.apply_chat_template(chats.conversation(int(index)), tokenize=False)
            except TemplateError as error:
                raise TextError(
                    f"conversation {index + 1} of {chats.origin} does not fit the chat template: {error}",
                    hint="Gemma's template wants user and assistant in turn, and Gemma 2 has no system role",
                ) from error
            ids, sizes = self._encode(rendered)
            keep = ids != self.bos
            parts.append((ids[keep], sizes[keep]))
            total += len(parts[-1][0])
            if total >= wanted:
                break
        all_ids, all_sizes = zip(*parts, strict=True)
        return np.concatenate(all_ids)[:wanted], np.concatenate(all_sizes)[:wanted]

    def _encode(self, text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + sum((code_points >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
        byte_at = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
        starts = np.fromiter(chain((start for start, _ in encoding.offsets), [len(text)]), np.int64, len(ids) + 1)
        return ids, np.diff(byte_at[starts])


def _cut(
    ids: npt.NDArray[np.int32],
    sizes: npt.NDArray[np.int64],
    bos: int,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Cut one stream of tokens into disjoint windows, drop the tail, and let the seed pick `samples` of them."""
    stride = sequence_length - 1
    count = len(ids) // stride
    picked = np.sort(np.random.default_rng(seed).permutation(count)[:samples])
    body = ids[: count * stride].reshape(count, stride)[picked]
    first = np.full((len(picked), 1), bos, np.int32)
    return np.concatenate([first, body], axis=1), sizes[: count * stride].reshape(count, stride)[picked].sum(axis=1)
