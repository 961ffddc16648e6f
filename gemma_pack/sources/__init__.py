"""Where bf16 weights come from: a model hub, a directory, or the demo package.

`obtain` is the way in. It ends with a whole, checked checkpoint in a directory and the record of its origin.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma_pack import __version__
from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from gemma_pack.console import Reporter
    from gemma_pack.record import SourceRecord

DEMO: Final = "demo"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that is ready to be quantized, and where it came from."""

    directory: Path
    record: SourceRecord
    fetched: bool
    """False where it was there already."""


def obtain(model: str, *, revision: str | None, output: Path | None, offline: bool, reporter: Reporter) -> Source:
    """Make the weights of `model` available in a directory.

    Args:
        model: `demo`, an existing directory, or a hub id such as google/gemma-2-9b-it.
        revision: branch, tag or commit of a hub model; None means what the hub's main branch names now.
        output: where to put the checkpoint; None means gemma-pack's cache, where the next call finds it again.
        offline: use only what this machine has.
        reporter: told of progress.

    Raises:
        InvalidUsageError: `model` is none of the three, an option does not go with it, or `output` is in the way.
        CheckpointError: the weights are damaged, not a supported Gemma, or not bf16.
        SourceError, MachineError, AccessError, OfflineError: see the sources.
    """
    is_hub = model != DEMO and not Path(model).is_dir() and _HUB_ID.fullmatch(model) is not None
    if revision is not None and not is_hub:
        raise InvalidUsageError(f"{model} has no revisions", hint="leave --revision out; it belongs to hub models")
    if model == DEMO:
        return _obtain_demo(output, reporter)
    if Path(model).is_dir():
        if output is not None:
            raise InvalidUsageError(f"the directory {model} is used in place", hint="leave --output out")
        from gemma_pack.sources.directory import check_directory

        return Source(Path(model), check_directory(Path(model), reporter), fetched=False)
    raise InvalidUsageError(
        f"{model} is neither demo, nor an existing directory, nor a hub id",
        hint="a hub id looks like google/gemma-2-9b-it",
    )


def default_output(model: str) -> Path | None:
    """Return where `download` puts `model` unless told: its name, here; None for a directory, which stays in place."""
    if model == DEMO:
        from gemma_pack.sources.demo import MODEL_ID

        return Path(MODEL_ID.rpartition("/")[2])
    return None if Path(model).is_dir() else Path(model.rpartition("/")[2])


def cache_directory() -> Path:
    """Return where fetched checkpoints are kept: $GEMMA_PACK_CACHE, else gemma-pack in the user's cache."""
    if configured := os.environ.get("GEMMA_PACK_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-pack"


def _obtain_demo(output: Path | None, reporter: Reporter) -> Source:
    from gemma_pack.sources.demo import MODEL_ID, assemble_demo
    from gemma_pack.sources.files import recorded_source

    target = output or cache_directory() / "demo" / __version__ / MODEL_ID.rpartition("/")[2]

    def present() -> Source | None:
        record = recorded_source(target) if target.is_dir() else None
        return Source(target, record, fetched=False) if record and record.kind == "demo" else None

    if found := present():
        return found
    if output is None and target.exists():
        reporter.warn(f"{target} is damaged and is made again")
        shutil.rmtree(target)
    try:
        return Source(target, assemble_demo(target, reporter), fetched=True)
    except InvalidUsageError:
        if found := present():  # another process was faster
            return found
        raise
