"""A recipe: what is quantized, to what, with which algorithm, on which text, and what it may cost.

Recipes are YAML; the ones that gemma-pack ships lie in `recipes/` of the source tree and inside the wheel.
Every mistake is reported with its line.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gemma_pack.errors import RecipeError

NAME_PATTERN = r"^[a-z0-9][a-z0-9.-]*$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Weights(_Part):
    """How the weights of the decoder's linear layers are stored.

    Only what vLLM has kernels for on Gemma is accepted: its `compressed_tensors` schemes for int4 and int8
    weights (vllm/model_executor/layers/quantization/compressed_tensors).
    """

    type: Literal["int"]
    bits: Literal[4, 8]
    group_size: Literal[32, 64, 128] | None = None
    """Input columns that share a scale; None is one scale an output channel."""
    symmetric: bool = True
    observer: Literal["memoryless_minmax", "memoryless_mse"] = "memoryless_mse"
    """llm-compressor's observer that chooses the scales."""


class Gptq(_Part):
    """Settings of GPTQ (arXiv 2210.17323)."""

    dampening: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the mean of the Hessian's diagonal that is added to it."""
    block_size: Literal[32, 64, 128, 256] = 128
    """Columns quantized between two updates of the rest."""


class Calibration(_Part):
    """The text that statistics are taken from."""

    dataset: str
    """A hub dataset, `owner/name` or `owner/name:config`; the split is `split`."""
    split: str = "train"
    samples: Annotated[int, Field(ge=1)]
    sequence_length: Annotated[int, Field(ge=16)]
    seed: int = 0


class GateRow(_Part):
    """What a variant of a model up to a size may cost, as one-sided 95 % bounds. At least one margin is set."""

    up_to_parameters: Annotated[float, Field(gt=0)] | None = None
    """The row holds for models of at most so many parameters; None holds for all. The first that holds counts."""
    ppl_increase_percent: Annotated[float, Field(ge=0)] | None = None
    """100 (perplexity of the variant / perplexity of the base - 1) at most."""
    kl_nats: Annotated[float, Field(ge=0)] | None = None
    """Mean KL(base || variant) over the full vocabulary, nats a token, at most."""
    same_top1_percent: Annotated[float, Field(ge=0, le=100)] | None = None
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
    weights: Weights
    algorithm: Literal["gptq"]
    gptq: Gptq = Gptq()
    ignore: tuple[str, ...] = ()
    """Linear layers of the decoder to leave in bf16: whole module names, or `re:` and a regular expression.
    Embeddings, head, vision tower and projector are never quantized, whatever this says."""
    calibration: Calibration
    gate: Annotated[tuple[GateRow, ...], Field(min_length=1)]

    def digest(self) -> str:
        """Return the sha256 of the recipe's meaning: comments and the order of keys do not count."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

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
    try:
        return Path(name_or_path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "gemma-pack recipes lists the shipped ones"
        raise RecipeError(f"cannot read the recipe {name_or_path}: {error}", hint=hint) from error


def shipped_text(name: str) -> str:
    """Return the YAML of a shipped recipe, comments included; raise RecipeError for an unknown name."""
    names = shipped_names()
    if name not in names:
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(names)}"
        raise RecipeError(f"there is no recipe named {name}", hint=hint)
    text: str = (_shipped() / f"{name}.yaml").read_text("utf-8")
    return text


def parse_recipe(text: str, *, origin: str) -> Recipe:
    """Parse and check a recipe; `origin` names the file in errors.

    Raises:
        RecipeError: with the line of the first mistake, and all others below it.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{origin}:{mark.line + 1}" if mark else origin
        raise RecipeError(f"{place}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"{origin}: a recipe is a mapping of keys to values", hint="gemma-pack recipes show w4a16 is an example"
        )
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{origin}:{_line(root, e['loc'])}: {'.'.join(map(str, e['loc']))}: {_sentence(e)}" for e in error.errors()
        ]
        raise RecipeError("\n".join(lines), hint="gemma-pack recipes show w4a16 is an example") from error


def _sentence(error: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "missing":
        return "is missing"
    given = "" if isinstance(error["input"], dict | list) else f", not {error['input']!r}"
    return f"{error['msg'].removeprefix('Value error, ')}{given}"


def _line(node: yaml.Node | None, location: tuple[int | str, ...]) -> int:
    """Return the line, from 1, of the deepest node on the way to `location`."""
    line = node.start_mark.line if node else 0
    for step in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(step)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line
        else:
            break
    return line + 1


def _is_path(name_or_path: str) -> bool:
    return "/" in name_or_path or os.sep in name_or_path or name_or_path.endswith((".yaml", ".yml"))


def _shipped() -> Any:  # noqa: ANN401 - importlib's Traversable or a Path
    """Return where the recipes lie: inside the wheel, or at the top of a source tree."""
    packaged = resources.files("gemma_pack") / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"
