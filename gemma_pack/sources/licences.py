"""The licence that a model's card names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def card_licence(readme: Path) -> str | None:
    """Return the licence in the metadata of a README.md; None where there is none, or where only people can read it."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        card = (metadata_load(readme) if readme.is_file() else None) or {}
    except (ValueError, YAMLError):  # not UTF-8, not YAML, or a list
        return None
    return spelled(card.get("license"), card.get("license_name"))


def spelled(name: object, other_name: object) -> str | None:
    """Spell the licence of a model card, whose `other` stands for `license_name`."""
    if name == "other" and other_name:
        return str(other_name)
    return (", ".join(map(str, name)) if isinstance(name, list) else str(name or "")) or None
