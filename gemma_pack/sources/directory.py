"""Weights in a directory: checked, digested and used in place. Nothing is written into it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from gemma_pack.checkpoint import ADAPTER_NAME, INDEX_NAME, MERGE_FIRST, Checkpoint
from gemma_pack.digests import digest_files
from gemma_pack.errors import CheckpointError
from gemma_pack.gemma import norm_offset, require_bfloat16, require_supported
from gemma_pack.record import SourceRecord
from gemma_pack.sources.files import is_wanted
from gemma_pack.sources.kept import called, recorded_source
from gemma_pack.sources.licences import card_licence

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.console import Reporter


def check_directory(directory: Path, reporter: Reporter) -> SourceRecord:
    """Check that `directory` holds a whole bf16 Gemma, and return where it came from.

    A gemma-pack.json in it is believed as far as its digests still match the files; without one, the source is the
    directory itself, by the name that huggingface_hub's cache gives it where it lies there.

    Raises:
        CheckpointError: damaged, incomplete, not a Gemma, quantized already, or not bf16.
    """
    checkpoint = Checkpoint.open(directory)
    require_supported(checkpoint.config)
    require_bf16_tensors(checkpoint)
    checkpoint.require_tokenizer()
    if (directory / ADAPTER_NAME).is_file():
        reporter.warn(f"the adapter beside the weights is not applied: {MERGE_FIRST}")
    present = {path.name: path for path in (*checkpoint.shards, *checkpoint.companions())}
    if (directory / INDEX_NAME).exists():
        present[INDEX_NAME] = directory / INDEX_NAME
    recorded = recorded_source(directory)
    names = {file.path for file in recorded.files} if recorded else set(filter(is_wanted, present))
    files = digest_files((directory / name for name in names), "Checking digests", reporter)
    if recorded and sorted(recorded.files, key=lambda file: file.path) == list(files):
        return recorded
    if recorded:
        reporter.warn(f"the files in {directory} no longer match its gemma-pack.json, so its origin is not recorded")
        files = digest_files((path for name, path in present.items() if is_wanted(name)), "Checking digests", reporter)
    model_id, commit = called(directory)
    own = "gemma" if norm_offset(checkpoint.config) else "apache-2.0"  # of Google's own: Gemma 4 is Apache-2.0
    return SourceRecord(
        kind="directory",
        model_id=model_id,
        revision=commit,
        files=files,
        license=card_licence(directory / "README.md") or own,
    )


def require_bf16_tensors(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every tensor of the checkpoint is bfloat16."""
    dtypes = Counter(info.dtype for info in checkpoint.tensors.values())
    if "F16" in dtypes:
        require_bfloat16({"dtype": "float16"})  # the one place that says why
    others = [info for info in checkpoint.tensors.values() if info.dtype != "BF16"]
    if others:
        raise CheckpointError(
            f"{len(others)} of {len(checkpoint.tensors)} tensors are not BF16, the first is {others[0].name}: "
            f"{others[0].dtype}",
            hint="use the bfloat16 checkpoint of the model",
        )
