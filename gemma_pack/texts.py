"""Calibration and evaluation text, cut into windows of token ids that each start with exactly one <bos>.

A text is `builtin` (the prose of the running Python's documentation topics), a .txt or .jsonl file, or a hub
dataset. Prose is joined by blank lines, tokenised once without special tokens, cut into disjoint windows of
`sequence_length - 1` tokens, and <bos> is put before each: Gemma's likelihood is meaningless without it. Chats
are rendered by the model's own template, which already writes <bos>, and packed one after the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from gemma_pack.errors import AccessError, OfflineError, TextError
from gemma_pack.record import TextRecord
from gemma_pack.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from gemma_pack.console import Reporter

Purpose = Literal["calibration", "evaluation"]

BUILTIN: Final = "builtin"
PROSE_CHARACTERS: Final = 16 << 20
"""Prose is read up to here, or to 16 characters for each token asked for if that is more, so that windows can be
drawn from all over a corpus of ordinary size, and one of any size stays within memory."""
_HUB_SPEC: Final = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_HUB_TIMEOUT_S: Final = 20.0


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
    text = _open_text(spec, purpose, split=split, offline=offline, reporter=reporter)
    encode = _Encoder(tokenizer)
    wanted = samples * (sequence_length - 1)
    if isinstance(text, _Chats):
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


@dataclass(frozen=True, slots=True)
class _Prose:
    """Pieces of running text, in order."""

    origin: str
    pieces: Iterable[str]


@dataclass(frozen=True, slots=True)
class _Chats:
    """Conversations, each a list of {"role", "content"}; `rows` can be indexed in any order."""

    origin: str
    rows: Any
    column: str | None = None

    def conversation(self, index: int) -> list[dict[str, str]]:
        row = self.rows[index]
        messages: list[dict[str, str]] = row if self.column is None else row[self.column]
        return messages


def builtin_halves() -> tuple[list[str], list[str]]:
    """Return the prose of pydoc_data.topics in two halves that share no paragraph: to calibrate, to evaluate.

    Many topics repeat paragraphs of others (`compound` holds `if`, `for` and `class`), so a paragraph stays with
    the shortest topic that has it. Then each topic, the longest first, goes to the half that is shorter so far:
    both halves mix long reference chapters with short entries.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: list[tuple[str, str]] = []
    for name, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        fresh = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph.rstrip())
        if fresh:
            kept.append((name, "\n\n".join(fresh)))
    halves: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    sizes = [0, 0]
    for name, text in sorted(kept, key=lambda item: (-len(item[1]), item[0])):
        shorter = 0 if sizes[0] <= sizes[1] else 1
        halves[shorter].append((name, text))
        sizes[shorter] += len(text)
    calibration, evaluation = ([text for _, text in sorted(half)] for half in halves)
    return calibration, evaluation


def _open_text(spec: str, purpose: Purpose, *, split: str, offline: bool, reporter: Reporter | None) -> _Prose | _Chats:
    if spec == BUILTIN:
        return _Prose(BUILTIN, builtin_halves()[0 if purpose == "calibration" else 1])
    path = Path(spec).expanduser()
    if path.suffix in {".txt", ".jsonl"} or path.is_file():
        return _open_file(path)
    match = _HUB_SPEC.fullmatch(spec)
    if match is None:
        raise TextError(
            f"there is no text named {spec}",
            hint="a text is builtin, a .txt or .jsonl file, or a hub dataset as owner/name[:config][@revision]",
        )
    if reporter:
        reporter.status(f"opening the dataset {spec}")
    option = "--calibration builtin" if purpose == "calibration" else "--text builtin"
    dataset = _HubSpec(match["name"], match["config"], match["revision"])
    return _open_dataset(dataset, split, offline=offline, instead=option)


def _open_file(path: Path) -> _Prose | _Chats:
    if path.suffix not in {".txt", ".jsonl"}:
        raise TextError(f"{path} is neither a .txt nor a .jsonl file", hint="rename it, or convert it to one of them")
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise TextError(f"there is no file {path}", hint="check the path, or use builtin") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
    if path.suffix == ".txt":
        return _Prose(path.name, [text] if text.strip() else [])
    rows = [_parse_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        return _Prose(path.name, [])
    pieces = [row for row in rows if isinstance(row, str)]
    if pieces and len(pieces) < len(rows):
        raise TextError(f"{path} mixes lines of text with lines of messages", hint="put them into two files")
    return _Prose(path.name, pieces) if pieces else _Chats(path.name, rows)


def _parse_line(path: Path, number: int, line: str) -> str | list[dict[str, str]]:
    """Return the text or the messages of one line of JSON."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TextError(f"{path}:{number}: not JSON: {error}") from error
    if isinstance(row, dict):
        text, messages = row.get("text"), row.get("messages")
        if isinstance(text, str):
            return text
        if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
            return messages
    raise TextError(
        f"{path}:{number}: neither a text nor a chat",
        hint='a line is {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}',
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


@dataclass(frozen=True, slots=True)
class _HubSpec:
    name: str
    config: str | None
    revision: str | None

    @property
    def title(self) -> str:
        return f"{self.name}:{self.config}" if self.config else self.name


def _open_dataset(spec: _HubSpec, split: str, *, offline: bool, instead: str) -> _Prose | _Chats:
    """Open a hub dataset at a commit: of the revision asked for, else the one that the hub or the cache has now."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    offline = offline or datasets.config.HF_HUB_OFFLINE
    commit = None if offline else _hub_commit(spec, instead)
    try:
        with _hub_offline() if offline else nullcontext():
            dataset = datasets.load_dataset(spec.name, spec.config, split=split, revision=commit)
    except ConnectionError as error:
        raise OfflineError(
            f"the dataset {spec.title} is out of reach and not in the cache", hint=f"use {instead}"
        ) from error
    except (DatasetsError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TextError(f"the dataset {spec.title} cannot be loaded: {reason}", hint=f"or use {instead}") from error
    commit = commit or _cached_commit(dataset)
    if offline and spec.revision not in {None, commit}:
        raise OfflineError(
            f"the cache has {spec.title} at {commit}, not at {spec.revision}", hint=f"go online, or use {instead}"
        )
    origin = f"{spec.title}@{commit}" if commit else spec.title
    if "messages" in dataset.column_names:
        return _Chats(origin, dataset, "messages")
    if "text" in dataset.column_names:
        return _Prose(origin, (row["text"] for row in dataset))
    columns = ", ".join(dataset.column_names)
    raise TextError(f"the dataset {spec.title} has neither a text nor a messages column; it has {columns}")


def _cached_commit(dataset: Any) -> str | None:  # noqa: ANN401 - a datasets.Dataset
    """Return the commit that a cached dataset was built from: the name of the directory that `datasets` puts it in."""
    names = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    return next((name for name in names if _COMMIT.fullmatch(name)), None)


def _hub_commit(spec: _HubSpec, instead: str) -> str:
    """Return the commit that the hub names now for the revision of the dataset."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    name = spec.name
    page = f"https://huggingface.co/datasets/{name}"
    try:
        commit = HfApi().dataset_info(name, revision=spec.revision, timeout=_HUB_TIMEOUT_S).sha
    except GatedRepoError as error:
        raise AccessError(
            f"the dataset {name} is gated", hint=f"accept its terms at {page}, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise TextError(
            f"the hub has no dataset {name}, or it is private", hint=f"see {page}; or use {instead}"
        ) from error
    except (httpx.HTTPError, HfHubHTTPError, ConnectionError) as error:
        raise OfflineError(f"the dataset {name} is out of reach: {error}", hint=f"use {instead}") from error
    if not commit:
        raise TextError(f"the hub names no commit of the dataset {name}", hint=f"use {instead}")
    return commit


@contextmanager
def _hub_offline() -> Iterator[None]:
    """Keep `datasets` and `huggingface_hub` off the network; both read their switch when a request is made."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _joined(prose: _Prose, limit: int) -> str:
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

    def chats(self, chats: _Chats, wanted: int, seed: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
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
