"""How a command or a build composes the stages: each function runs one stage with what the stage before left on disk.

Stages never call one another; this is the one place where the output of one becomes the input of the next.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_pack.disk import require_makeable
from gemma_pack.errors import CheckpointError, InvalidUsageError, MachineError
from gemma_pack.task_results import TASKS_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.served import Servers
    from gemma_pack.evaluation.tasks import TaskChoice
    from gemma_pack.quantization.variant import Variant
    from gemma_pack.recipe import Calibration, Recipe
    from gemma_pack.record import Record
    from gemma_pack.report import Report
    from gemma_pack.texts import Windows


@dataclass(frozen=True, slots=True)
class CalibrationChoice:
    """What a user says about the calibration text; None leaves it to the recipe."""

    dataset: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    seed: int | None = None

    def applied_to(self, calibration: Calibration) -> Calibration:
        """Return the recipe's calibration with what the user said instead."""
        said = {key: value for key, value in asdict(self).items() if value is not None}
        return calibration.model_copy(update=said)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """What a user says about the servers that validate."""

    engine: str
    """The address of a vLLM server that serves the variant, or `vllm` to start one for base and variant."""
    base_engine: str | None = None
    served_model: str | None = None

    def servers(self, partial: Path) -> Servers:
        """Return the servers; what they read is kept in `partial` until there is a report."""
        from gemma_pack.evaluation.served import Servers

        return Servers(
            variant=self.engine,
            base=self.base_engine,
            model=self.served_model,
            kept=partial,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskNames:
    """What a user says about tasks."""

    names: tuple[str, ...] = ()
    suite: str | None = None
    limit: int | None = None

    def choice(self, partial: Path, *, offline: bool) -> TaskChoice:
        """Return the tasks; what they find is kept in `partial` until there is a report."""
        from gemma_pack.evaluation.tasks import TaskChoice

        return TaskChoice(
            names=self.names,
            suite=self.suite,
            limit=self.limit,
            kept=partial / "scores",
            items=partial / "items",
            offline=offline,
        )


def quantize_model(
    model: str,
    recipe_name: str,
    target: Path,
    choice: CalibrationChoice,
    *,
    revision: str | None = None,
    device: str = "auto",
    offline: bool = False,
    reporter: Reporter,
) -> Variant:
    """Obtain `model`, cut the calibration windows and quantize into `target`, with a model card beside the weights."""
    return quantize_models(
        model, {target: recipe_name}, choice, revision=revision, device=device, offline=offline, reporter=reporter
    )[0]


def quantize_models(
    model: str,
    recipes: Mapping[Path, str],
    choice: CalibrationChoice,
    *,
    revision: str | None = None,
    device: str = "auto",
    offline: bool = False,
    reporter: Reporter,
) -> list[Variant]:
    """Do what `quantize_model` does for the recipe at each target; those that calibrate alike share the pass over it.

    Under torchrun every process calls this, and together they do the work of one.
    """
    import torch

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.quantization.ranks import joined_ranks
    from gemma_pack.quantization.variant import Job, quantize_together
    from gemma_pack.recipe import load_recipe, recipe_text
    from gemma_pack.reports.card import write_card
    from gemma_pack.sources import obtain
    from gemma_pack.text_sources import require_text

    loaded = {target: load_recipe(name) for target, name in recipes.items()}
    texts = {target: choice.applied_to(recipe.calibration) for target, recipe in loaded.items() if recipe.calibration}
    # before gigabytes are fetched for nothing
    if device == "cuda":
        resolve_device(device)
    for calibration in texts.values():
        require_text(calibration.dataset)
    computes_on = resolve_device(device)
    with joined_ranks(torch.device(computes_on)) as ranks:
        if not ranks.is_first:  # the first one fetches, the others find it
            ranks.wait()
        source = obtain(model, revision=revision, output=None, offline=offline, reporter=reporter)
        if ranks.is_first:
            ranks.wait()
        base = Checkpoint.open(source.directory)
        cutter = _WindowCutter(source.directory, offline=offline, reporter=reporter)
        jobs = {
            target: Job(
                base=base,
                source=source.record,
                recipe=recipe,
                recipe_text=recipe_text(recipes[target]),
                windows=cutter.cut(texts.get(target)),
                refinement_windows=cutter.cut(_refinement_text(texts[target], recipe)) if recipe.refinement else None,
                device=computes_on,
            )
            for target, recipe in loaded.items()
        }
        variants = quantize_together(jobs, reporter, ranks)
    for variant in variants:
        if (variant.made_now or variant.has_new_recipe) and is_first_process():
            write_card(variant.directory)
    return variants


def is_first_process() -> bool:
    """Say whether this process is the only one, or the one of several under torchrun that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


class _WindowCutter:
    """Cuts calibration windows, each kind once."""

    def __init__(self, tokenizer: Path, *, offline: bool, reporter: Reporter) -> None:
        self._tokenizer, self._offline, self._reporter = tokenizer, offline, reporter
        self._cut: dict[Calibration, Windows] = {}

    def cut(self, calibration: Calibration | None) -> Windows | None:
        from gemma_pack.texts import load_windows

        if calibration is not None and calibration not in self._cut:
            self._cut[calibration] = load_windows(
                calibration.dataset,
                "calibration",
                self._tokenizer,
                samples=calibration.samples,
                sequence_length=calibration.sequence_length,
                seed=calibration.seed,
                split=calibration.split,
                offline=self._offline,
                reporter=self._reporter,
            )
        return self._cut[calibration] if calibration is not None else None


def _refinement_text(calibration: Calibration, recipe: Recipe) -> Calibration:
    """Return the same text, cut as refinement wants it."""
    if recipe.refinement is None:
        return calibration
    shape = {"samples": recipe.refinement.windows, "sequence_length": recipe.refinement.sequence_length}
    return calibration.model_copy(update=shape)


def default_stem(model: str) -> str:
    """Return the name that outputs begin with: the last part of a hub id or path, or the id of what the path holds."""
    from gemma_pack.sources.kept import called

    if model == "demo":
        return "gemma-3-270m"
    return called(Path(model))[0].rpartition("/")[2] if Path(model).is_dir() else Path(model).name


def resolve_device(device: str) -> str:
    """Return `cuda` or `cpu` for `auto`, and check that a device asked for by name is there.

    Raises:
        MachineError: CUDA was asked for, and there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("no CUDA device is to be had here", hint="leave out --device cuda to use the CPU")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def validate_variant(
    directory: Path,
    report_directory: Path,
    *,
    against: str | None,
    profile_name: str,
    text: str,
    recipe_name: str | None = None,
    seed: int = 0,
    device: str = "auto",
    engine: EngineChoice | None = None,
    tasks: TaskNames | None = None,
    margins: Mapping[str, float] | None = None,
    extend: bool = False,
    gptq_protocol: bool = False,
    offline: bool = False,
    reporter: Reporter,
) -> Report:
    """Validate the variant in `directory` against its base; write the report, and the verdict into record and card.

    Args:
        directory: what `quantize` wrote.
        report_directory: where report.json and its renderings go.
        against: the base, as `obtain` takes it; None means the one that the record names.
        profile_name: one of `PROFILES`.
        text: evaluation text, as `load_windows` takes it.
        recipe_name: whose gate judges; None means that of the variant's own recipe.yaml.
        seed: which windows are drawn, and the bootstrap's draws.
        device: `auto`, `cpu` or `cuda`.
        engine: the servers that compute; None computes in this process.
        tasks: the benchmark tasks to run besides; None for none.
        margins: what the gate allows instead of what the recipe says, by measure.
        extend: an undecided run takes more windows, once.
        gptq_protocol: also measure perplexity as papers do on WikiText-2.
        offline: use no network.
        reporter: told of progress.

    Raises:
        InvalidUsageError: the record names a directory as base, and `against` is not given.
        CheckpointError: the variant cannot be compared with the base, or its recipe.yaml is not what it was made by.
    """
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.evaluation.profiles import PROFILES
    from gemma_pack.evaluation.validation import Comparison, validate
    from gemma_pack.record import require_record
    from gemma_pack.reports.card import variant_name, write_card
    from gemma_pack.reports.writing import write_reports
    from gemma_pack.sources import obtain
    from gemma_pack.texts import load_gptq_windows, load_windows

    report_directory = report_directory.absolute()  # it may be ".", which has no name
    _check_beforehand(report_directory, tasks)
    Checkpoint.open(directory)
    record = require_record(directory)
    recipe = gate_recipe(directory, record, recipe_name)
    model, revision = base_of(record) if against is None else (against, None)
    if device == "cuda":
        resolve_device(device)  # before gigabytes are fetched for nothing
    source = obtain(model, revision=revision, output=None, offline=offline, reporter=reporter)
    profile = PROFILES[profile_name]

    def cut(samples: int) -> Windows:
        return load_windows(
            text,
            "evaluation",
            source.directory,
            samples=samples,
            sequence_length=profile.sequence_length,
            seed=seed,
            split="test",
            offline=offline,
            reporter=reporter,
        )

    partial = report_directory.with_name(f"{report_directory.name}.partial")
    comparison = Comparison(
        variant=directory,
        record=record,
        base=source.directory,
        base_source=source.record,
        recipe=recipe,
        margins=margins or {},
        windows=cut(profile.windows),
        profile=profile,
        device=resolve_device(device),
        seed=seed,
        kept=partial,
        extend=cut if extend else None,
        gptq_windows=load_gptq_windows(source.directory, offline=offline) if gptq_protocol else None,
        servers=engine.servers(partial) if engine else None,
        tasks=tasks.choice(partial, offline=offline) if tasks else None,
    )
    report = validate(comparison, reporter)
    if comparison.tasks:
        _replace_items(comparison.tasks.items, report_directory / TASKS_DIRECTORY)
    write_reports(report, report_directory, variant_name(record))
    shutil.rmtree(partial, ignore_errors=True)  # there is none where nothing was kept
    record.model_copy(update={"validation": report.summary()}).write(directory)
    write_card(directory)
    return report


def _check_beforehand(report_directory: Path, tasks: TaskNames | None) -> None:
    """Raise InvalidUsageError where a report cannot be written or would lie in a checkpoint, and for unknown tasks."""
    from gemma_pack.report import REPORT_NAME

    require_makeable(report_directory / REPORT_NAME, option="--report")
    if (report_directory / "config.json").is_file():
        raise InvalidUsageError(
            f"{report_directory} is a checkpoint, which a report would become a part of",
            hint="name another directory with --report",
        )
    if tasks:
        tasks.choice(report_directory, offline=True).require_known()


def _replace_items(items: Path, target: Path) -> None:
    """Put the items that a report names in the place of those of an earlier one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    items.rename(target)


def gate_recipe(directory: Path, record: Record, recipe_name: str | None) -> Recipe:
    """Return the recipe whose gate judges the variant in `directory`: the one named, else the one it was made by.

    Raises:
        CheckpointError: the record has no quantization, or recipe.yaml is not the recipe that the record names.
        RecipeError: there is no such recipe, or it is invalid.
    """
    from gemma_pack.recipe import load_recipe

    if record.quantization is None:
        raise CheckpointError(
            f"{directory} is no variant: its record has no quantization", hint="run gemma-pack quantize first"
        )
    if recipe_name:
        return load_recipe(recipe_name)
    recipe = load_recipe(str(directory / "recipe.yaml"))
    if recipe.digest() != record.quantization.recipe_sha256:
        raise CheckpointError(
            f"{directory / 'recipe.yaml'} is not the recipe that the variant was made by",
            hint="pass the recipe whose gate should judge with --recipe",
        )
    return recipe


def base_of(record: Record) -> tuple[str, str | None]:
    """Return the base that the record names, as a model and a revision for `obtain`.

    Raises:
        InvalidUsageError: it was a directory; a record holds no paths.
    """
    source = record.source
    if source.kind == "directory":
        raise InvalidUsageError(
            f"the variant was made from a directory named {source.model_id}, and the record does not say where it lies",
            hint="pass the directory with --against",
        )
    return ("demo", None) if source.kind == "demo" else (source.model_id, source.revision)
