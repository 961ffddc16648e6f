"""Refuses to compare what cannot be compared: a variant of another base, another tokenizer, another chat template.

All of these would give figures that look like quantization damage, or hide it.
"""

from __future__ import annotations

import filecmp
from typing import TYPE_CHECKING, Any

from gemma_pack.checkpoint import read_json
from gemma_pack.errors import CheckpointError
from gemma_pack.gemma import text_config

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gemma_pack.record import FileDigest, SourceRecord


def require_same_base(recorded: SourceRecord, given: SourceRecord) -> None:
    """Raise CheckpointError unless the weights that the variant was made from are the weights given as its base."""
    expected, found = _weights(recorded.files), _weights(given.files)
    if expected == found:
        return
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    raise CheckpointError(
        f"this is a variant of another base: it was made from {recorded.model_id}"
        f"{f' at {recorded.revision}' if recorded.revision else ''}, and {given.model_id} has other weights "
        f"({', '.join(names[:3])}{', …' if len(names) > 3 else ''})",
        hint="pass the base that gemma-pack.json names with --against",
    )


def require_same_language(variant: Path, base: Path) -> None:
    """Raise CheckpointError, naming the difference, unless both read and write the same tokens."""
    configs = [read_json(directory / "config.json") for directory in (variant, base)]
    kinds = [config.get("model_type") for config in configs]
    if kinds[0] != kinds[1]:
        raise _different(f"the variant's config.json says model_type {kinds[0]!r}, the base's {kinds[1]!r}")
    sizes = [text_config(config).get("vocab_size") for config in configs]
    if sizes[0] != sizes[1]:
        raise _different(f"the variant's vocabulary has {sizes[0]} tokens, the base's {sizes[1]}")
    paths = variant / "tokenizer.json", base / "tokenizer.json"
    if not all(path.is_file() for path in paths) or not filecmp.cmp(*paths, shallow=False):
        _compare_tokenizers(*(read_json(path) for path in paths))
    templates = [chat_template(directory) for directory in (variant, base)]
    if templates[0] != templates[1]:
        raise _different(f"their chat templates differ: {_first_difference(*templates)}")


def chat_template(directory: Path) -> str | None:
    """Return the chat template of the tokenizer in `directory`: a file of its own, else in tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    config = directory / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None


def _weights(files: Iterable[FileDigest]) -> dict[str, str]:
    return {file.path: file.sha256 for file in files if file.path.endswith(".safetensors")}


def _compare_tokenizers(variant: dict[str, Any], base: dict[str, Any]) -> None:
    """Compare what two tokenizer.json mean; the order of keys and white space do not count."""
    vocabularies = [tokenizer.get("model", {}).get("vocab") for tokenizer in (variant, base)]
    if vocabularies[0] != vocabularies[1] and all(isinstance(vocabulary, dict) for vocabulary in vocabularies):
        ours, theirs = vocabularies
        token = min(
            (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
            key=lambda token: (ours.get(token, theirs.get(token)), token),
        )
        places = [f"{vocabulary[token]}" if token in vocabulary else "missing" for vocabulary in vocabularies]
        raise _different(
            f"their tokenizers differ: {token!r} is {places[0]} in the variant's, {places[1]} in the base's"
        )
    for section in sorted(variant.keys() | base.keys()):
        if variant.get(section) != base.get(section):
            raise _different(f"their tokenizers differ in {section!r} of tokenizer.json")


def _first_difference(variant: str | None, base: str | None) -> str:
    if variant is None or base is None:
        return f"the {'variant' if variant is None else 'base'} has none"
    pairs = zip([*variant.split("\n"), ""], [*base.split("\n"), ""], strict=False)
    for number, (ours, theirs) in enumerate(pairs, 1):
        if ours != theirs:
            return f"line {number} is {ours.strip()[:60]!r} in the variant's, {theirs.strip()[:60]!r} in the base's"
    return "one is longer"


def _different(sentence: str) -> CheckpointError:
    return CheckpointError(
        f"variant and base cannot be compared: {sentence}",
        hint="copy the base's tokenizer files into the variant, or quantize again",
    )
