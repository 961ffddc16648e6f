"""What changed between two validations of the same windows: what `gemma-pack report OLD NEW` prints as JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Change(_Part):
    """One measure of two runs on the same windows, paired: `difference` is new minus old, with one-sided bounds."""

    name: str
    old: float
    new: float
    difference: float
    lower: float
    upper: float
    noise: float
    """What bf16 arithmetic alone moved this measure by in these runs; a smaller change is none."""
    outcome: Literal["regressed", "improved", "no change shown"]
    unit: str = ""


class Changes(_Part):
    """What `gemma-pack report OLD NEW` found."""

    schema_version: Literal[1] = 1
    old_sha256: str
    new_sha256: str
    windows: int
    regressed: bool
    changes: tuple[Change, ...]
