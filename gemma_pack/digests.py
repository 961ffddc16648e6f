"""Digests of whole files, as records name them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from gemma_pack.checkpoint import file_sha256
from gemma_pack.record import FileDigest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gemma_pack.console import Reporter

_THREADS: Final = 2
"""sha256 lets other threads run; more would only wait for the disk."""


def digest_files(paths: Iterable[Path], title: str, reporter: Reporter) -> tuple[FileDigest, ...]:
    """Return the digest and size of each file, sorted by name, with progress in bytes under `title`."""
    ordered = sorted(paths, key=lambda path: path.name)
    total = sum(path.stat().st_size for path in ordered)
    with reporter.progress(title, total, "bytes") as task, ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda path: file_sha256(path, task.advance), ordered)
        return tuple(
            FileDigest(path=path.name, sha256=sha256, size_bytes=path.stat().st_size)
            for path, sha256 in zip(ordered, digests, strict=True)
        )
