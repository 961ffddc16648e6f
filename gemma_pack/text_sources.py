"""Where calibration and evaluation text comes from: builtin prose, a file, or a dataset of the hub.

Opening a text reads nothing from the network unless it is a hub dataset, and reads no more of it than is asked for.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from gemma_pack import wikitext2
from gemma_pack.errors import AccessError, OfflineError, TextError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gemma_pack.console import Reporter

Purpose = Literal["calibration", "evaluation"]

BUILTIN: Final = "builtin"
_HUB_SPEC: Final = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_HUB_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Prose:
    """Pieces of running text, in order."""

    origin: str
    pieces: Iterable[str]


@dataclass(frozen=True, slots=True)
class Chats:
    """Conversations, each a list of {"role", "content"}; `rows` can be indexed in any order."""

    origin: str
    rows: Any
    column: str | None = None

    def conversation(self, index: int) -> list[dict[str, str]]:
        """Return the messages of one conversation."""
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


def require_text(spec: str) -> None:
    """Raise TextError if `spec` names no text, before anything is fetched in vain; what it holds is read later."""
    if spec in (BUILTIN, wikitext2.NAME):
        return
    if (path := _file_of(spec)) is None:
        _hub_name(spec)
    elif not path.is_file():
        _open_file(path)


def _file_of(spec: str) -> Path | None:
    path = Path(spec).expanduser()
    return path if path.suffix in {".txt", ".jsonl"} or path.is_file() else None


def _hub_name(spec: str) -> re.Match[str]:
    match = _HUB_SPEC.fullmatch(spec)
    if match is None:
        raise TextError(
            f"there is no text named {spec}",
            hint="a text is builtin, wikitext2, a .txt or .jsonl file, or a hub dataset as "
            "owner/name[:config][@revision]",
        )
    return match


def open_text(spec: str, purpose: Purpose, *, split: str, offline: bool, reporter: Reporter | None) -> Prose | Chats:
    """Return the text that `spec` names; see `load_windows` for the arguments and errors."""
    if spec == BUILTIN:
        return Prose(BUILTIN, builtin_halves()[0 if purpose == "calibration" else 1])
    if spec == wikitext2.NAME:
        return Prose(wikitext2.ORIGIN, wikitext2.read_wikitext2(offline=offline))
    if (path := _file_of(spec)) is not None:
        return _open_file(path)
    match = _hub_name(spec)
    if reporter:
        reporter.status(f"opening the dataset {spec}")
    option = "--calibration builtin" if purpose == "calibration" else "--text builtin"
    dataset = _HubSpec(match["name"], match["config"], match["revision"])
    return _open_dataset(dataset, split, offline=offline, instead=option)


def _open_file(path: Path) -> Prose | Chats:
    if path.suffix not in {".txt", ".jsonl"}:
        raise TextError(f"{path} is neither a .txt nor a .jsonl file", hint="rename it, or convert it to one of them")
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise TextError(f"there is no file {path}", hint="check the path, or use builtin") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}", hint="save it as UTF-8"
        ) from error
    if path.suffix == ".txt":
        return Prose(path.name, [text] if text.strip() else [])
    rows = [_parse_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        return Prose(path.name, [])
    pieces = [row for row in rows if isinstance(row, str)]
    if pieces and len(pieces) < len(rows):
        raise TextError(f"{path} mixes lines of text with lines of messages", hint="put them into two files")
    return Prose(path.name, pieces) if pieces else Chats(path.name, rows)


def _parse_line(path: Path, number: int, line: str) -> str | list[dict[str, str]]:
    """Return the text or the messages of one line of JSON."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TextError(
            f"{path}:{number}: not JSON: {error}", hint='write a line as {"text": "…"}, or name the file .txt'
        ) from error
    if isinstance(row, dict):
        text, messages = row.get("text"), row.get("messages")
        if isinstance(text, str):
            _require_whole(text, path, number)
            return text
        if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
            for message in messages:
                _require_whole(message["role"] + message["content"], path, number)
            return messages
    raise TextError(
        f"{path}:{number}: neither a text nor a chat",
        hint='a line is {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}',
    )


def _require_whole(text: str, path: Path, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"{path}:{number}: {text[error.start]!a} is half of a character",
            hint="a text was cut inside a surrogate pair: cut it again by code points, or leave the line out",
        ) from error


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


def _open_dataset(spec: _HubSpec, split: str, *, offline: bool, instead: str) -> Prose | Chats:
    """Open a hub dataset at a commit: of the revision asked for, else the one that the hub or the cache has now."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    offline = offline or datasets.config.HF_HUB_OFFLINE
    commit = None if offline else _hub_commit(spec, instead)
    try:
        with hub_offline() if offline else nullcontext():
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
        return Chats(origin, dataset, "messages")
    if "text" in dataset.column_names:
        return Prose(origin, (row["text"] for row in dataset))
    columns = ", ".join(dataset.column_names)
    raise TextError(
        f"the dataset {spec.title} has neither a text nor a messages column; it has {columns}",
        hint="use another dataset, or write its text into a .txt file",
    )


def _cached_commit(dataset: Any) -> str | None:  # noqa: ANN401 - a datasets.Dataset
    """Return the commit that a cached dataset was built from: the name of the directory that `datasets` puts it in."""
    names = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    return next((name for name in names if _COMMIT.fullmatch(name)), None)


def _hub_commit(spec: _HubSpec, instead: str) -> str:
    """Return the commit that the hub names now for the revision of the dataset."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

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
    except RevisionNotFoundError as error:
        raise TextError(
            f"the dataset {name} has no revision {spec.revision}", hint=f"see {page}/commits/main"
        ) from error
    except HFValidationError as error:
        raise TextError(
            f"{name} is no name that the hub gives a dataset", hint=f"check the spelling, or use {instead}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise AccessError(
                f"the hub refused access to the dataset {name} ({status})", hint="log in with: hf auth login"
            ) from error
        raise TextError(
            f"the hub answered {status} for the dataset {name}", hint=f"try later, or use {instead}"
        ) from error
    except (httpx.HTTPError, ConnectionError) as error:
        raise OfflineError(f"the dataset {name} is out of reach: {error}", hint=f"use {instead}") from error
    if not commit:
        raise TextError(f"the hub names no commit of the dataset {name}", hint=f"use {instead}")
    return commit


@contextmanager
def hub_offline() -> Iterator[None]:
    """Keep `datasets` and `huggingface_hub` off the network; both read their switch when a request is made."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
