"""How the next token is drawn, by mode: as the model's makers say, the likeliest, or freely."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

Mode = Literal["chat", "factual", "creative"]
MODES: Final[tuple[Mode, ...]] = ("chat", "factual", "creative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Settings of one draw; temperature 0 takes the likeliest token, and the rest does not count then.

    Attributes:
        temperature: the logits are divided by it.
        top_k: so many of the likeliest tokens remain; None for all.
        top_p: the likeliest tokens remain whose probabilities sum up to it (nucleus, arXiv 1904.09751).
        min_p: tokens remain that are at least so likely relative to the likeliest (arXiv 2407.01082).
    """

    temperature: float
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY: Final = Sampling(temperature=0)
CREATIVE: Final = Sampling(temperature=1.5, min_p=0.1)
"""A high temperature with min-p, the pair that arXiv 2407.01082 finds still coherent."""


def sampling_of(mode: Mode, directory: Path) -> Sampling:
    """Return the settings of a mode; `chat` takes those that generation_config.json in `directory` names.

    Google publishes top_k 64 and top_p 0.95 there for Gemma 3, and nothing for Gemma 2.
    """
    if mode == "factual":
        return GREEDY
    if mode == "creative":
        return CREATIVE
    path = directory / "generation_config.json"
    said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return Sampling(
        temperature=float(said.get("temperature") or 1.0),
        top_k=said.get("top_k"),
        top_p=float(said.get("top_p") or 1.0),
    )


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token for float32 `logits` [vocabulary], drawn with `generator` of the same device."""
    import torch

    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, tokens = torch.sort(logits / sampling.temperature, descending=True)
    likely = torch.softmax(ordered, dim=-1)
    before = likely.cumsum(-1) - likely
    keep = (before < sampling.top_p) & (likely >= sampling.min_p * likely[0])  # the likeliest always remains
    if sampling.top_k:
        keep[sampling.top_k :] = False
    place = torch.multinomial(likely * keep, 1, generator=generator)
    return int(tokens[place])
