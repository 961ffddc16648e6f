"""Where bf16 weights come from: a model hub, a directory, or the demo package.

`obtain` is the way in. It ends with a whole, checked checkpoint in a directory and the record of its origin.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma_pack import __version__
from gemma_pack.errors import InvalidUsageError
from gemma_pack.sources.kept import Source, cache_directory, find_kept, keep

if TYPE_CHECKING:
    from gemma_pack.console import Reporter

__all__ = ["Source", "cache_directory", "default_output", "is_hub_id", "obtain"]

DEMO: Final = "demo"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


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
    refuse_file(model)
    is_directory = bool(model) and Path(model).is_dir()
    is_hub = model != DEMO and not is_directory and is_hub_id(model)
    if revision is not None and not is_hub:
        raise InvalidUsageError(f"{model} has no revisions", hint="leave --revision out; it belongs to hub models")
    if model == DEMO:
        return _obtain_demo(output, reporter)
    if is_directory:
        if output is not None:
            raise InvalidUsageError(f"the directory {model} is used in place", hint="leave --output out")
        from gemma_pack.sources.directory import check_directory

        return Source(Path(model), check_directory(Path(model), reporter), fetched=False)
    if is_hub:
        from gemma_pack.sources.pinned import obtain_pinned

        return obtain_pinned(model, revision, output=output, offline=offline, reporter=reporter)
    raise InvalidUsageError(
        f"{model or repr(model)} is neither demo, nor an existing directory, nor a hub id",
        hint="a hub id looks like google/gemma-2-9b-it",
    )


def refuse_file(model: str) -> None:
    """Raise InvalidUsageError where `model` is a file; one that lies a directory below would pass for a hub id."""
    if model != DEMO and Path(model).is_file():
        raise InvalidUsageError(
            f"{model} is a file", hint="pass the directory of a safetensors checkpoint; GGUF is not read"
        )


def is_hub_id(model: str) -> bool:
    """Say whether `model` is spelled like owner/name."""
    return _HUB_ID.fullmatch(model) is not None


def default_output(model: str) -> Path | None:
    """Return where `download` puts `model` unless told: its name, here; None for a directory, which stays in place."""
    if model == DEMO:
        from gemma_pack.sources.demo import MODEL_ID

        return Path(MODEL_ID.rpartition("/")[2])
    return None if Path(model).is_dir() else Path(model.rpartition("/")[2])


def _obtain_demo(output: Path | None, reporter: Reporter) -> Source:
    from gemma_pack.sources.demo import MODEL_ID, assemble_demo

    target = output or cache_directory() / "demo" / __version__ / MODEL_ID.rpartition("/")[2]
    return keep(
        target,
        lambda: find_kept(target, "demo", MODEL_ID),
        lambda: assemble_demo(target, reporter),
        disposable=output is None,
        reporter=reporter,
    )
