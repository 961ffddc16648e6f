"""A recipe: what is quantized, to what, with which algorithm, on which text, and what it may cost.

Recipes are YAML; the ones that gemma-pack ships lie in `recipes/` of the source tree and inside the wheel.
Every mistake is reported with its line.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from gemma_pack.errors import RecipeError
from gemma_pack.gemma import possible_groups
from gemma_pack.yaml_file import parse_yaml, read_text

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

NAME_PATTERN = r"^[a-z0-9][a-z0-9.-]*$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Count = Annotated[int, Field(ge=1, strict=True)]
"""Strict, because YAML's `yes` would else be 1."""
Tokens = Annotated[int, Field(ge=16, strict=True)]
Seed = Annotated[int, Field(ge=0, strict=True)]


class Gptq(_Part):
    """Settings of GPTQ (arXiv 2210.17323)."""

    dampening: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the mean of the Hessian's diagonal that is added to it."""
    block_size: Literal[32, 64, 128, 256] = 128
    """Columns quantized between two updates of the rest."""
    sink_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the Hessian that the windows' <bos> makes, which every later token attends to; 0: a token as any."""


class Smoothing(_Part):
    """Settings of smoothing (SmoothQuant, arXiv 2211.10438)."""

    strength: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """How much of the outliers moves from activations into weights."""


class Refinement(_Part):
    """Settings of the end-to-end tuning of the scales."""

    steps: Count
    windows_a_step: Count = 2
    sequence_length: Tokens = 256
    learning_rate: Annotated[float, Field(gt=0, le=0.1)] = 1e-3
    """Peak rate of Adam on the logarithm of the scales: 1e-3 moves a scale by about 0.1 % a step at most."""
    held_out: Count = 16
    """Windows of the calibration text that only judge; the scales that do best on them are kept."""
    seed: Seed = 0
    """Order of the windows."""

    @property
    def windows(self) -> int:
        """Windows that are asked for: enough that none is used twice, and those held out."""
        return self.steps * self.windows_a_step + self.held_out


class Calibration(_Part):
    """The text that statistics are taken from."""

    dataset: Annotated[str, Field(min_length=1)]
    """A hub dataset, `owner/name` or `owner/name:config`; the split is `split`."""
    split: str = "train"
    samples: Count
    sequence_length: Tokens
    seed: Seed = 0


def _refuse_yes_and_no(value: object) -> object:
    if isinstance(value, bool):  # which Python counts as 1 and 0
        raise ValueError("is yes or no, and a number is wanted")  # noqa: TRY004 - pydantic reports ValueErrors
    return value


Number = Annotated[float, BeforeValidator(_refuse_yes_and_no)]


class GateRow(_Part):
    """What a variant of a model up to a size may cost, as one-sided 95 % bounds. At least one margin is set."""

    up_to_parameters: Annotated[Number, Field(gt=0)] | None = None
    """The row holds for models of at most so many parameters; None holds for all. The first that holds counts."""
    ppl_increase_percent: Annotated[Number, Field(ge=0)] | None = None
    """100 (perplexity of the variant / perplexity of the base - 1) at most."""
    kl_nats: Annotated[Number, Field(ge=0)] | None = None
    """Mean KL(base || variant) over the full vocabulary, nats a token, at most."""
    same_top1_percent: Annotated[Number, Field(ge=0, le=100)] | None = None
    """Share of tokens where both rank the same token first, at least."""

    @model_validator(mode="after")
    def _judges_something(self) -> GateRow:
        if self.ppl_increase_percent is None and self.kl_nats is None and self.same_top1_percent is None:
            raise ValueError("sets no margin: give ppl_increase_percent, kl_nats or same_top1_percent")
        return self


class Recipe(_Part):
    """One recipe, valid."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    summary: str
    scheme: Literal["W4A16", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "BNB_INT8", "BNB_NF4"]
    """compressed-tensors' name for what weights and activations become, or one of bitsandbytes' two formats."""
    group_size: Literal[32, 64, 128] | None = None
    """Input columns that share a scale; None is 128, as in compressed-tensors' presets of both."""
    observer: Literal["memoryless_minmax", "memoryless_mse", "signed_mse", "signed_gptq"] = "memoryless_mse"
    """What chooses the scales of weights: llm-compressor's observers, or for int4 and int8 in groups scales with the
    sign that makes best use of the codes, `signed_gptq` by what GPTQ will count each column's error."""
    algorithm: Literal["nearest", "gptq"]
    """`nearest` rounds each weight by itself; `gptq` makes up for each rounding in the weights still to come."""
    gptq: Gptq = Gptq()
    kv_cache: Literal["fp8"] | None = None
    """`fp8` adds scales for a server's cache of keys and values, which then takes half the memory; None leaves it in
    bf16."""
    smoothing: Smoothing | None = None
    """None leaves activations as they are."""
    refinement: Refinement | None = None
    """None leaves the scales as the algorithm chose them."""
    ignore: tuple[str, ...] = ()
    """Linear layers of the decoder to leave in bf16: whole module names, or `re:` and a regular expression.
    Embeddings, head, vision tower and projector are never quantized, whatever this says."""
    calibration: Calibration | None = None
    """None for a recipe that needs no data."""
    gate: tuple[GateRow, ...]

    @field_validator("ignore")
    @classmethod
    def _leave_what_servers_fuse_whole(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        patterns = [_pattern(entry) for entry in entries]
        unused = dict(zip(entries, patterns, strict=True))
        for group in possible_groups() if entries else ():
            ignored = [name for name in group if any(pattern.fullmatch(name) for pattern in patterns)]
            unused = {e: p for e, p in unused.items() if not any(p.fullmatch(name) for name in ignored)}
            if 0 < len(ignored) < len(group):
                others = [name for name in group if name not in ignored]
                raise ValueError(
                    f"{ignored[0]} is ignored and {others[0]} is not, and servers fuse them into one matrix"
                )
        if unused:
            raise ValueError(
                f"{next(iter(unused))} is no linear layer of a Gemma's decoder; embeddings, head and towers are never "
                "quantized"
            )
        return entries

    @field_validator("gate")
    @classmethod
    def _judges(cls, rows: tuple[GateRow, ...]) -> tuple[GateRow, ...]:
        if not rows:
            raise ValueError("there is no row, so nothing would be judged")
        limits = [row.up_to_parameters for row in rows]
        for before, limit in itertools.pairwise(limits):
            if before is None or (limit is not None and limit <= before):
                raise ValueError(
                    "a row is never reached: sort the rows by rising up_to_parameters, the one without it last"
                )
        return rows

    @model_validator(mode="after")
    def _leaves_bitsandbytes_alone(self) -> Recipe:
        if self.for_bitsandbytes and self.algorithm != "nearest":
            raise ValueError(f"algorithm must be nearest with {self.scheme}: bitsandbytes rounds by itself")
        if self.for_bitsandbytes and self.kv_cache:
            raise ValueError(f"kv_cache has no effect with {self.scheme}: its servers read no scales of a cache")
        if self.for_bitsandbytes and "observer" in self.model_fields_set:
            raise ValueError(f"observer has no effect with {self.scheme}: bitsandbytes chooses its scales by itself")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.group_size and self.scheme not in ("W4A16", "W8A16"):
            raise ValueError(f"group_size goes with W4A16 and W8A16; the groups of {self.scheme} are fixed")
        if self.refinement and self.scheme not in ("W4A16", "W8A16"):
            raise ValueError(f"refinement tunes the scales of W4A16 and W8A16, not of {self.scheme}")
        if self.scales_have_signs and self.scheme not in ("W4A16", "W8A16"):
            raise ValueError(f"observer {self.observer} is for W4A16 and W8A16, not for {self.scheme}")
        if self.observer == "signed_gptq" and self.algorithm != "gptq":
            raise ValueError("observer signed_gptq goes with algorithm gptq; signed_mse is for rounding to nearest")
        if self.smoothing and self.scheme not in ("W8A8", "FP8", "FP8_DYNAMIC", "NVFP4"):
            raise ValueError(f"smoothing is for schemes that quantize activations, not for {self.scheme}")
        if self.needs_calibration and self.calibration is None:
            raise ValueError(
                "calibration is missing: GPTQ, smoothing, refinement, kv_cache and static scales learn from text"
            )
        if not self.needs_calibration and self.calibration is not None:
            raise ValueError("calibration has no effect: this recipe rounds to nearest and learns nothing from text")
        return self

    @property
    def scales_have_signs(self) -> bool:
        """Whether scales below zero are among those that the observer may choose."""
        return self.observer.startswith("signed_")

    @property
    def for_bitsandbytes(self) -> bool:
        """Whether the variant is in a format of bitsandbytes, not of compressed-tensors."""
        return self.scheme.startswith("BNB_")

    @property
    def needs_calibration(self) -> bool:
        """Whether text shapes the result."""
        return (
            self.algorithm == "gptq"
            or self.smoothing is not None
            or self.refinement is not None
            or self.kv_cache is not None
            or self.scheme in ("FP8", "NVFP4")
        )

    @property
    def columns_divisor(self) -> int:
        """What must divide a layer's input columns: the size of a group or block, else 1."""
        fixed = {"W4A16": 128, "W8A16": 128, "FP8_BLOCK": 128, "NVFP4": 16}
        return self.group_size or fixed.get(self.scheme, 1)

    def digest(self) -> str:
        """Return the sha256 of what shapes the variant: comments, order of keys, summary and gate do not count."""
        return hashlib.sha256(self.model_dump_json(exclude={"summary", "gate"}).encode()).hexdigest()

    def gate_for(self, parameters: int) -> GateRow:
        """Return the gate's row for a model of `parameters` parameters.

        Raises:
            RecipeError: no row holds for a model of that size.
        """
        for row in self.gate:
            if row.up_to_parameters is None or parameters <= row.up_to_parameters:
                return row
        raise RecipeError(
            f"the gate of recipe {self.name} has no row for a model of {parameters / 1e9:.1f} billion parameters",
            hint="end the gate with a row that has no up_to_parameters",
        )


def _pattern(entry: str) -> re.Pattern[str]:
    """Return what an entry of `ignore` matches; raise ValueError where its regular expression is none."""
    if not entry.startswith("re:"):
        return re.compile(re.escape(entry))
    pattern = entry.removeprefix("re:")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern} is no regular expression: {error}") from error


def shipped_names() -> list[str]:
    """Return the names of the recipes inside the package, sorted."""
    return sorted(path.name.removesuffix(".yaml") for path in _shipped().iterdir() if path.name.endswith(".yaml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Return the shipped recipe of that name, or the one in that file (anything with a slash or `.yaml`).

    Raises:
        RecipeError: unknown name (with the closest one as hint), unreadable file or invalid recipe.
    """
    origin = name_or_path if _is_path(name_or_path) else f"{name_or_path}.yaml"
    return parse_recipe(recipe_text(name_or_path), origin=origin)


def recipe_text(name_or_path: str) -> str:
    """Return the YAML of the shipped recipe of that name, or of the file; raise RecipeError like `load_recipe`."""
    if not _is_path(name_or_path):
        return shipped_text(name_or_path)
    return read_text(Path(name_or_path), hint="gemma-pack recipes lists the shipped ones", error=RecipeError)


def shipped_text(name: str) -> str:
    """Return the YAML of a shipped recipe, comments included; raise RecipeError for an unknown name."""
    names = shipped_names()
    if name not in names:
        if Path(name).is_file():
            raise RecipeError(f"{name} is a file without .yaml behind its name", hint=f"write ./{name}, or rename it")
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(names)}"
        raise RecipeError(f"there is no recipe named {name}", hint=hint)
    return (_shipped() / f"{name}.yaml").read_text("utf-8")


def parse_recipe(text: str, *, origin: str) -> Recipe:
    """Parse and check a recipe; `origin` names the file in errors.

    Raises:
        RecipeError: with every mistake and its line.
    """
    return parse_yaml(
        Recipe, text, origin=origin, hint="gemma-pack recipes show w4a16 is an example", error=RecipeError
    )


def _is_path(name_or_path: str) -> bool:
    return "/" in name_or_path or os.sep in name_or_path or name_or_path.endswith((".yaml", ".yml"))


def _shipped() -> Traversable:
    """Return where the recipes lie: inside the wheel, or at the top of a source tree."""
    packaged = resources.files("gemma_pack") / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"
