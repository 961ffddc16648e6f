"""What a build made of one model by one recipe, as far as it came: a row of its table and of its index page."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotation
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from gemma_pack.errors import GemmaPackError, known_error
from gemma_pack.report import Report  # noqa: TC001 - pydantic reads the annotation

Stage = Literal["quantize", "validate", "package", "push"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class BuiltImage(_Part):
    """The variant in one layout."""

    kind: Literal["modelcar", "artifact"]
    layout: Path
    digest: str
    pinned: str | None = None
    """`registry/name@digest` where it was pushed."""

    @property
    def name(self) -> str:
        """What to call it by: where it was pushed, else where it lies."""
        return self.pinned or f"{self.layout}@{self.digest}"


class StageFailure(_Part):
    """Why a stage ended early."""

    stage: Stage
    message: str
    hint: str | None
    exit_code: int

    @classmethod
    def of(cls, stage: Stage, error: Exception) -> StageFailure:
        """Return the failure that an error stands for."""
        known = known_error(error) or GemmaPackError(
            f"{type(error).__name__}: {error}", hint="GEMMA_PACK_DEBUG=1 shows where it happened"
        )
        return cls(stage=stage, message=known.message, hint=known.hint, exit_code=known.exit_code)


class VariantOutcome(_Part):
    """A variant, its report and its images; what is None was not reached."""

    model: str
    recipe: str
    directory: Path
    base_size_bytes: int | None = None
    size_bytes: int | None = None
    report: Report | None = None
    images: tuple[BuiltImage, ...] = ()
    failure: StageFailure | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def digest(self) -> str | None:
        """Of the first image."""
        return self.images[0].digest if self.images else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def pinned(self) -> str | None:
        """The first image where it was pushed."""
        return self.images[0].pinned if self.images else None

    def failed(self, stage: Stage, error: Exception) -> VariantOutcome:
        """Return this outcome, which ended early in `stage`."""
        return self.model_copy(update={"failure": StageFailure.of(stage, error)})

    @property
    def share(self) -> float | None:
        """Its size, of the base's."""
        return self.size_bytes / self.base_size_bytes if self.size_bytes and self.base_size_bytes else None

    @property
    def word(self) -> str:
        """In a word: the verdict, or that a stage failed."""
        return "error" if self.failure or self.report is None else self.report.verdict

    @property
    def exit_code(self) -> int:
        """What a build of this variant alone exits with."""
        if self.failure:
            return self.failure.exit_code
        return {"pass": 0, "fail": 10, "undecided": 11}[self.word]


def worst(outcomes: tuple[VariantOutcome, ...]) -> VariantOutcome:
    """Return the outcome whose exit code a build ends with: a stage that failed, a failed gate, an undecided one."""
    order = ("error", "fail", "undecided", "pass")
    return min(outcomes, key=lambda outcome: order.index(outcome.word))
