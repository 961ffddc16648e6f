"""Which files make up a source of weights, and their digests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gemma_pack.checkpoint import INDEX_NAME, file_sha256
from gemma_pack.record import FileDigest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gemma_pack.console import Reporter

_WANTED: Final = frozenset(
    {
        INDEX_NAME,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "processor_config.json",
    }
)
_LEGAL_STEMS: Final = ("license", "licence", "notice", "readme", "use_policy", "gemma_terms")


def is_wanted(name: str) -> bool:
    """Tell whether a checkpoint needs the file: safetensors, config, tokenizer, processor, licence or readme.

    Pickled weights, other formats, images and everything in subdirectories are not wanted.
    """
    if "/" in name or name.startswith("."):
        return False
    return name in _WANTED or name.endswith(".safetensors") or name.lower().startswith(_LEGAL_STEMS)


def digest_files(paths: Iterable[Path], reporter: Reporter) -> tuple[FileDigest, ...]:
    """Return the digest and size of each file, sorted by name, with progress in bytes."""
    ordered = sorted(paths, key=lambda path: path.name)
    with reporter.progress("Checking digests", sum(path.stat().st_size for path in ordered), "bytes") as task:
        return tuple(
            FileDigest(path=path.name, sha256=file_sha256(path, task.advance), size_bytes=path.stat().st_size)
            for path in ordered
        )
