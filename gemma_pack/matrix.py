"""A build: a variant for each model and recipe, each through all stages: quantize, validate, package, push.

Every stage finds what an earlier run left and does not do it again: a variant made from the same inputs, a report on
the same windows, an image of the same files, blobs that the registry has. So an interrupted build goes on when the
same command is run again, and loses at most the running stage. A variant that fails stops no other.

Here the recipes of one model share the pass over the calibration text; `cluster` gives each variant a worker.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_pack.errors import InvalidUsageError
from gemma_pack.outcome import BuiltImage, Stage, VariantOutcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gemma_pack.build_file import BuildFile, ModelPart, ValidationPart
    from gemma_pack.console import Reporter
    from gemma_pack.oci.base import BaseChoice
    from gemma_pack.oci.package import PackageResult
    from gemma_pack.quantization.variant import Variant
    from gemma_pack.recipe import Recipe
    from gemma_pack.record import Record
    from gemma_pack.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One variant of a build."""

    base: ModelPart
    recipe_name: str
    """A shipped recipe, or the path of a file."""
    recipe: Recipe
    directory: Path
    repository: str | None
    """Where it goes when it has passed; its tag is the recipe's name."""

    def begun(self) -> VariantOutcome:
        """Return the outcome before the first stage."""
        return VariantOutcome(model=self.base.model, recipe=self.recipe.name, directory=self.directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """How the stages of a build work."""

    device: str = "auto"
    offline: bool = False


def wanted_variants(plan: BuildFile) -> tuple[Wanted, ...]:
    """Return the variants that a build is to make, those of one model together.

    Raises:
        InvalidUsageError: a recipe is wrong, or two variants would be made in one place.
    """
    from gemma_pack.build import default_stem
    from gemma_pack.recipe import load_recipe

    output = Path(plan.output)
    recipes = {name: load_recipe(name) for name in plan.recipes}
    bases = dict.fromkeys(plan.bases())
    wanted: dict[Path, Wanted] = {}
    for base in bases:
        stem = default_stem(base.model)
        repository = f"{plan.push}/{stem.lower()}" if plan.push and len(bases) > 1 else plan.push
        for name, recipe in recipes.items():
            directory = output / f"{stem}-quantized.{recipe.name}"
            if other := wanted.get(directory):
                raise InvalidUsageError(
                    f"{other.recipe_name} of {other.base.model} and {name} of {base.model} would both make {directory}",
                    hint="give the recipes different names, or build the models into different directories",
                )
            wanted[directory] = Wanted(
                base=base, recipe_name=name, recipe=recipe, directory=directory, repository=repository
            )
    return tuple(wanted.values())


def require_stages(plan: BuildFile) -> None:
    """Check what the later stages are asked for, before hours are spent on the first one.

    Raises:
        TextError: there is no such text to validate on.
        InvalidUsageError, RegistryError: the base of the images is none, broken, or lacks a platform.
    """
    from gemma_pack.oci.base import require_base
    from gemma_pack.text_sources import require_text

    require_text(plan.validation.text)
    if plan.package.layout != "artifact":  # which has no base
        require_base(_base(plan))


def _base(plan: BuildFile) -> BaseChoice:
    from gemma_pack.oci.base import BaseChoice
    from gemma_pack.oci.manifest import Platform

    return BaseChoice(plan.package.base, tuple(Platform.parse(text) for text in plan.package.platforms))


def build_here(plan: BuildFile, wanted: Sequence[Wanted], means: Means, reporter: Reporter) -> Iterator[VariantOutcome]:
    """Yield each variant, packed or failed: model by model, whose recipes learn from the text in one pass."""
    for base in dict.fromkeys(one.base for one in wanted):
        group = [one for one in wanted if one.base == base]
        names = ", ".join(one.recipe.name for one in group)
        reporter.status(f"── {names} of {base.model}")
        made = quantize_group(plan, group, means, reporter)
        for one in group:
            if len(group) > 1:
                reporter.status(f"── {one.recipe.name} of {base.model}")
            yield finish_variant(plan, one, made[one.directory], means, reporter)


def quantize_group(
    plan: BuildFile, group: Sequence[Wanted], means: Means, reporter: Reporter
) -> dict[Path, Variant | Exception]:
    """Quantize one model by several recipes; return each variant, or why there is none, by its directory.

    Where one of them fails, those that cannot be made are left out and the others go on from their journals.
    """
    from gemma_pack.build import CalibrationChoice, quantize_models

    said = plan.calibration
    try:
        variants = quantize_models(
            group[0].base.model,
            {one.directory: one.recipe_name for one in group},
            CalibrationChoice(said.text, said.samples, said.sequence_length, said.seed),
            revision=group[0].base.revision,
            device=means.device,
            offline=means.offline,
            reporter=reporter,
        )
        return {variant.directory: variant for variant in variants}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this variant's, and it is shown
        _show_traceback()
        if len(group) == 1:
            return {group[0].directory: error}
    misfits = {one.directory: why for one in group if (why := _misfit(one, means))}
    rest = [one for one in group if one.directory not in misfits]
    parts = [rest] if misfits else [[one] for one in rest]
    made: dict[Path, Variant | Exception] = {**misfits}
    for part in parts:
        if part:
            made |= quantize_group(plan, part, means, reporter)
    return made


def _misfit(one: Wanted, means: Means) -> Exception | None:
    """Return why a variant cannot be made at all, as far as headers and the disk show it."""
    from gemma_pack.disk import refuse_existing
    from gemma_pack.planning.sizes import plan_sizes
    from gemma_pack.record import read_record
    from gemma_pack.sources.outline import outline

    try:
        found = outline(one.base.model, revision=one.base.revision, offline=means.offline)
        plan_sizes(found.checkpoint, one.recipe, found.companions)
        if not one.directory.is_dir() or read_record(one.directory) is None:
            refuse_existing(one.directory)
    except Exception as error:  # noqa: BLE001 - as above
        return error
    return None


def finish_variant(
    plan: BuildFile, one: Wanted, made: Variant | Exception, means: Means, reporter: Reporter
) -> VariantOutcome:
    """Validate and pack what was quantized; return how far it came."""
    outcome = one.begun()
    if isinstance(made, Exception):
        return outcome.failed("quantize", made)
    stage: Stage = "validate"
    try:
        quantization = made.record.quantization
        if quantization is None:
            raise AssertionError("quantize left no record of what it did")
        sizes = {"base_size_bytes": quantization.base_size_bytes, "size_bytes": quantization.size_bytes}
        outcome = outcome.model_copy(update=sizes)
        report = _report(plan, one, made.record, means, reporter)
        outcome = outcome.model_copy(update={"report": report})
        stage = "package"
        return outcome.model_copy(update={"images": _package(plan, one.directory, reporter)})
    except Exception as error:  # noqa: BLE001 - as above
        _show_traceback()
        return outcome.failed(stage, error)


def _report(plan: BuildFile, one: Wanted, record: Record, means: Means, reporter: Reporter) -> Report:
    """Return the report on the variant: the one of an earlier run where it answers the same question."""
    from gemma_pack.build import validate_variant
    from gemma_pack.report import REPORT_NAME, read_report, report_directory

    target = report_directory(one.directory)
    asked = plan.validation
    if record.validation and (target / REPORT_NAME).is_file():
        found = read_report(target / REPORT_NAME)
        right = _answers(found, asked) and _is_judged_by(found, one.recipe) and _reads_same(found, asked, one.directory)
        if right and found.digest() == record.validation.report_sha256:
            reporter.status(f"{target} is there already, on the same windows")
            return found
    return validate_variant(
        one.directory,
        target,
        against=one.base.model if Path(one.base.model).is_dir() else None,
        profile_name=asked.profile,
        text=asked.text,
        seed=asked.seed,
        extend=asked.extend,
        device=means.device,
        offline=means.offline,
        reporter=reporter,
    )


def _answers(report: Report, asked: ValidationPart) -> bool:
    """Say whether a report is on the windows that are asked for, with as many looks at them."""
    from gemma_pack.evaluation.statistics import CONFIDENCE
    from gemma_pack.wikitext2 import NAME, ORIGIN

    text = ORIGIN if asked.text == NAME else asked.text
    read, looks = report.protocol.text, 2 if asked.extend else 1
    return (
        report.protocol.profile == asked.profile
        and read.seed == asked.seed
        and (read.spec in {text, Path(text).name} or read.spec.partition("@")[0] == text)
        and math.isclose(1 - report.method.confidence, (1 - CONFIDENCE) / looks)
    )


def _is_judged_by(report: Report, recipe: Recipe) -> bool:
    """Say whether the margins of a report are those of the recipe's gate as it reads now."""
    row = recipe.gate_for(report.base.parameters)
    return report.gate is not None and report.gate.margins == row.model_dump(
        exclude={"up_to_parameters"}, exclude_none=True
    )


def _reads_same(report: Report, asked: ValidationPart, directory: Path) -> bool:
    """Say whether a text that is a file still gives the windows of a report; of other texts that is taken for granted.

    `directory` has the tokenizer.
    """
    from gemma_pack.texts import load_windows

    read = report.protocol.text
    if not Path(asked.text).is_file():
        return True
    found = load_windows(
        asked.text, "evaluation", directory, samples=read.windows, sequence_length=read.sequence_length, seed=read.seed
    )
    return found.record.sha256 == read.sha256


def _package(plan: BuildFile, directory: Path, reporter: Reporter) -> tuple[BuiltImage, ...]:
    """Pack the variant in the layouts that the plan asks for.

    They are the build's own: what an earlier one packed there on another base, or at another SOURCE_DATE_EPOCH, goes.
    """
    from gemma_pack.oci.package import package
    from gemma_pack.oci.package_pair import package_pair

    asked = plan.package
    modelcar = directory.with_name(f"{directory.name}.oci")
    artifact = directory.with_name(f"{directory.name}.artifact.oci")
    for layout in (modelcar, artifact):
        _discard_stale(layout, directory)
    base = _base(plan)
    packed: tuple[PackageResult, ...]
    if asked.layout == "both":
        pair = package_pair(directory, modelcar, artifact, base=base, replace=True, reporter=reporter)
        packed = (pair.modelcar, pair.artifact)
    elif asked.layout == "artifact":
        packed = (package(directory, artifact, kind="artifact", replace=True, reporter=reporter),)
    else:
        packed = (package(directory, modelcar, base=base, replace=True, reporter=reporter),)
    return tuple(BuiltImage(kind=one.kind, layout=one.layout, digest=one.digest) for one in packed)


def _discard_stale(layout: Path, directory: Path) -> None:
    """Remove an image that an earlier build packed from a variant or report that has changed since."""
    from gemma_pack.checkpoint import RECORD_NAME

    if (layout / "oci-layout").is_file():
        packed = (layout / "index.json").stat().st_mtime_ns
        if (directory / RECORD_NAME).stat().st_mtime_ns > packed:
            shutil.rmtree(layout)


def _show_traceback() -> None:
    if os.environ.get("GEMMA_PACK_DEBUG"):
        import traceback

        traceback.print_exc()
