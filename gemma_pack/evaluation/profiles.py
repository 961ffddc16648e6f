"""How much a validation reads and generates. More of both makes the verdict surer and takes longer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Profile:
    """Windows to score, their length in tokens, greedy prompts, and the most tokens of an answer."""

    name: str
    windows: int
    sequence_length: int
    prompts: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that are scored: all but the <bos> of each window."""
        return self.windows * (self.sequence_length - 1)


PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile("smoke", windows=8, sequence_length=256, prompts=4, answer_tokens=16),
        Profile("quick", windows=32, sequence_length=512, prompts=16, answer_tokens=32),
        Profile("full", windows=256, sequence_length=1024, prompts=128, answer_tokens=128),
    )
}
