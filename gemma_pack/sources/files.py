"""Which files make up a source of weights."""

from __future__ import annotations

from typing import Final

from gemma_pack.checkpoint import INDEX_NAME

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
