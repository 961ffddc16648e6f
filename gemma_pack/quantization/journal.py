"""Finished layers on disk, so that an interrupted run goes on where it stopped.

The journal lies beside the target in a directory named by the digest of all that shapes the result: weights,
recipe, text, seed, device and library versions. Other inputs never find it. A layer's file appears whole or not at all.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from typing import TYPE_CHECKING

import safetensors.torch
from safetensors import SafetensorError

from gemma_pack import __version__
from gemma_pack.disk import write_atomic
from gemma_pack.errors import CheckpointError
from gemma_pack.safetensors_file import read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def journal_directory(target: Path, identity: Mapping[str, object]) -> Path:
    """Return where the journal of the run lies that writes `target` from the inputs that `identity` names.

    Another version of this program may round otherwise, so it does not go on with an earlier one's layers.
    """
    shaped_by = {**identity, "gemma-pack": __version__}
    key = hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()
    return target.parent / f".{target.name}.journal-{key[:16]}"


def remove_journals(target: Path, *, but: Path | None = None) -> None:
    """Remove what earlier runs left beside `target`: for other inputs, or with all done but tidying up."""
    for journal in target.parent.glob(f".{glob.escape(target.name)}.journal-*"):
        if journal != but:
            shutil.rmtree(journal, ignore_errors=True)  # its own process may be at it, too


class Journal:
    """The finished layers of one run."""

    def __init__(self, target: Path, identity: Mapping[str, object]) -> None:
        """Open the journal of the run that writes `target` from the inputs that `identity` names."""
        self.directory = journal_directory(target, identity)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_journals(target, but=self.directory)
        self.directory.mkdir(mode=0o700, exist_ok=True)

    def path(self, entry: str) -> Path:
        """Return the file of an entry."""
        return self.directory / f"{entry}.safetensors"

    def holds(self, entry: str) -> bool:
        """Say whether there is an entry, whole as far as its header and length tell."""
        if not self.path(entry).exists():
            return False
        try:
            read_header(self.path(entry))
        except CheckpointError:  # the machine went down while the disk's cache held the file
            return False
        return True

    def layers(self) -> list[Path]:
        """Return the files of the finished groups of layers, in the order of the layers."""
        return sorted(self.directory.glob("layer-*.safetensors"))

    def load(self, entry: str) -> dict[str, Tensor] | None:
        """Return the tensors of an entry such as `layer-007`, or None."""
        path = self.path(entry)
        if not path.exists():
            return None
        try:
            return safetensors.torch.load(path.read_bytes())
        except SafetensorError:  # the machine went down while the disk's cache held the file
            path.unlink()
            return None

    def save(self, entry: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of an entry, replacing an earlier one."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomic(self.path(entry), safetensors.torch.save(contiguous))

    def close(self) -> None:
        """Remove the journal: the variant is whole."""
        shutil.rmtree(self.directory, ignore_errors=True)  # another process may be at it, too
