"""What a build is asked to do: the file that a user writes, and what the command line says instead of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from gemma_pack.errors import InvalidUsageError
from gemma_pack.yaml_file import parse_yaml, read_text

if TYPE_CHECKING:
    from pydantic import ValidationInfo

SUFFIXES: Final = (".yaml", ".yml")
"""Of a build file: what tells it from a model."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelPart(_Part):
    """One of several models, and which state of it."""

    model: str
    revision: str | None = None


def _as_part(entry: Any) -> Any:  # noqa: ANN401 - what YAML holds
    return {"model": entry} if isinstance(entry, str) else entry


class CalibrationPart(_Part):
    """What replaces the recipes' own calibration text; what is left out stays theirs."""

    text: str | None = None
    samples: Annotated[int, Field(ge=1, strict=True)] | None = None
    sequence_length: Annotated[int, Field(ge=16, strict=True)] | None = None
    seed: Annotated[int, Field(ge=0, strict=True)] | None = None


class ValidationPart(_Part):
    """How each variant is judged."""

    text: str = "builtin"
    profile: Literal["smoke", "quick", "full"] = "quick"
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    extend: bool = False
    """An undecided verdict takes more windows, once."""


_PLATFORM: Final = re.compile(r"[a-z0-9_.-]+(/[a-z0-9_.-]+){1,2}")
"""As packaging reads it; with a variant of the architecture, or without."""


class PackagePart(_Part):
    """As what the variants are packed, what lies under a modelcar's weights, and for which platforms."""

    layout: Literal["modelcar", "artifact", "both"] = "modelcar"
    base: str = "embedded"
    platforms: tuple[str, ...] = ()

    @field_validator("platforms")
    @classmethod
    def _require_platforms(cls, platforms: tuple[str, ...]) -> tuple[str, ...]:
        for text in platforms:
            if not _PLATFORM.fullmatch(text):
                raise ValueError(f"{text!r} is not os/architecture, such as linux/amd64")
        return platforms


class BuildFile(_Part):
    """What to build from which models by which recipes: a variant for each pair."""

    model: str | None = None
    """The one model; `models` are several."""
    models: Annotated[tuple[Annotated[ModelPart, BeforeValidator(_as_part)], ...], Field(validate_default=True)] = ()
    revision: str | None = None
    """Of `model`."""
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    output: str = "."
    """Directory for all that is made, below the working directory."""
    calibration: CalibrationPart = CalibrationPart()
    validation: ValidationPart = ValidationPart()
    package: PackagePart = PackagePart()
    push: str | None = None
    """`registry/name` to push to; the tag of each variant is its recipe's name. Several models have a repository
    each, below it."""

    @field_validator("models")
    @classmethod
    def _require_models(cls, models: tuple[ModelPart, ...], info: ValidationInfo) -> tuple[ModelPart, ...]:
        if "model" not in info.data:  # it is wrong itself, and that is said already
            return models
        if models and info.data["model"] is not None:
            raise ValueError("there is a model already: write model or models")
        if not models and info.data["model"] is None:
            raise ValueError("model is missing")
        return models

    @field_validator("revision")
    @classmethod
    def _require_one_model(cls, revision: str | None, info: ValidationInfo) -> str | None:
        if revision is not None and info.data.get("models"):
            raise ValueError("several models have a revision each: models: [{model: owner/name, revision: …}]")
        return revision

    def bases(self) -> tuple[ModelPart, ...]:
        """Return the models, each with its revision."""
        return self.models if self.model is None else (ModelPart(model=self.model, revision=self.revision),)


def load_build_file(path: Path) -> BuildFile:
    """Read and check a build file.

    Raises:
        InvalidUsageError: it cannot be read, or a line is wrong.
    """
    hint = "examples/demo.yaml is an example"
    return parse_yaml(BuildFile, read_text(path, hint=hint), origin=str(path), hint=hint)


def read_plan(targets: tuple[str, ...], said: dict[str, Any]) -> BuildFile:
    """Return what to build: the file that `targets` names, or the models, with what the command line says instead.

    Args:
        targets: a build file, or models.
        said: what was said of `BuildFile`'s fields, those of its parts as mappings; None is nothing said.

    Raises:
        InvalidUsageError: the file is wrong, or the options do not go with the targets.
    """
    said = {key: _said(value) for key, value in said.items() if value and _said(value)}
    files = [target for target in targets if target.endswith(SUFFIXES)]
    if files:
        if len(targets) > 1:
            raise InvalidUsageError(
                f"{files[0]} is a build file, and it names its models itself", hint="give one file, or models alone"
            )
        plan = load_build_file(Path(files[0]))
        if "revision" in said and plan.models:
            raise InvalidUsageError("--revision is of one model", hint=f"write the revisions into {files[0]}")
        return _merged(plan, said)
    if "recipes" not in said:
        raise InvalidUsageError(
            f"no recipe is said for {targets[0]}", hint="--recipe w4a16; gemma-pack recipes lists them"
        )
    if "revision" in said and len(targets) > 1:
        raise InvalidUsageError("--revision is of one model", hint="write the models and revisions into a build file")
    named: dict[str, Any] = {"model": targets[0]} if len(targets) == 1 else {"models": tuple(targets)}
    return _merged(BuildFile(recipes=said["recipes"], **named), said)


def _said(value: Any) -> Any:  # noqa: ANN401 - a field's value
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


def _merged(plan: BuildFile, said: dict[str, Any]) -> BuildFile:
    """Return the plan with what was said instead of its own; the parts keep what was not."""
    changes = {
        key: getattr(plan, key).model_copy(update=value) if isinstance(value, dict) else value
        for key, value in said.items()
    }
    return plan.model_copy(update=changes)
