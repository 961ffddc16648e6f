"""Where fetched checkpoints are kept, and how a later call finds one again without work."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_pack.disk import cache_directory
from gemma_pack.errors import CheckpointError, InvalidUsageError
from gemma_pack.record import read_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.record import SourceRecord

__all__ = ["Source", "cache_directory", "called", "find_kept", "keep", "recorded_source"]

_IN_LIBRARY_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")
"""How huggingface_hub's cache lays out a model (its `repo_folder_name`); no id has two hyphens in a row."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that is ready to be quantized, and where it came from."""

    directory: Path
    record: SourceRecord
    fetched: bool
    """False where it was there already."""


def called(directory: Path) -> tuple[str, str | None]:
    """Return what a model in a directory is called, and its commit, if it lies in huggingface_hub's cache."""
    resolved = directory.resolve()
    if match := _IN_LIBRARY_CACHE.fullmatch("/".join(resolved.parts[-3:])):
        return f"{match[1]}/{match[2]}", match[3]
    return resolved.name, None


def recorded_source(directory: Path) -> SourceRecord | None:
    """Return the source that the record in `directory` names, if its files are there in their recorded sizes.

    None where there is no record, where it describes a quantized variant, or where a file is missing or of another
    size.

    Raises:
        CheckpointError: there is a record, and it is broken.
    """
    record = read_record(directory)
    if record is None or record.quantization is not None:
        return None
    for file in record.source.files:
        path = directory / file.path
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            return None
    return record.source


def find_kept(directory: Path, kind: str, model_id: str, commit: str | None = None) -> Source | None:
    """Return the checkpoint in `directory` if it is whole and this model, at `commit` where one is given."""
    try:
        record = recorded_source(directory) if directory.is_dir() else None
    except CheckpointError:  # a broken record
        return None
    if record is None or (record.kind, record.model_id) != (kind, model_id):
        return None
    return Source(directory, record, fetched=False) if commit in (None, record.revision) else None


def keep(
    directory: Path,
    find: Callable[[], Source | None],
    fetch: Callable[[], SourceRecord],
    *,
    disposable: bool,
    reporter: Reporter,
) -> Source:
    """Return what `find` finds in `directory`, or fetch it there.

    What is in the way in a `disposable` directory, one of our cache, is removed.

    Raises:
        InvalidUsageError: something else is in the way.
    """
    if found := find():
        return found
    if disposable and directory.exists():
        reporter.warn(f"{directory} is damaged and is fetched again")
        shutil.rmtree(directory)
    try:
        return Source(directory, fetch(), fetched=True)
    except InvalidUsageError:
        if found := find():  # another process was faster
            return found
        raise
