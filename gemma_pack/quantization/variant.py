"""From a checkpoint and a recipe to a variant on disk: whole, proved and recorded, or not there at all."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gemma_pack.checkpoint import Checkpoint, write_index
from gemma_pack.disk import held_alone, refuse_existing, require_space, staged_directory, write_atomic
from gemma_pack.errors import GemmaPackError, TextError
from gemma_pack.gemma import TOWERS, require_supported, spellings
from gemma_pack.quantization.fitting import ignored_modules, linear_groups, require_divisible
from gemma_pack.quantization.heads import copied_heads, stored_heads
from gemma_pack.quantization.layout import variant_tensors
from gemma_pack.quantization.loader import fused_values, prove_loadable, require_servable
from gemma_pack.quantization.shards import copy_shards, link_shards
from gemma_pack.quantization.untouched import prove_untouched
from gemma_pack.recipe import load_recipe
from gemma_pack.record import (
    EquivalenceProof,
    QuantizationRecord,
    Record,
    RefinementRecord,
    read_record,
    require_record,
)
from gemma_pack.safetensors_file import TensorInfo, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.journal import Journal
    from gemma_pack.quantization.ranks import Ranks
    from gemma_pack.recipe import GateRow, Recipe
    from gemma_pack.record import SourceRecord, TextRecord
    from gemma_pack.texts import Windows

RECIPE_NAME: Final = "recipe.yaml"
REFINED: Final = "refined"
_LIBRARIES: Final = ("torch", "transformers", "llmcompressor", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant on disk, and whether this call made it."""

    directory: Path
    record: Record
    made_now: bool
    has_new_recipe: bool = False
    """Whether it was there, and recipe.yaml was replaced by one that differs in words or gate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that shapes one variant."""

    base: Checkpoint
    source: SourceRecord
    recipe: Recipe
    recipe_text: str
    """The recipe's YAML, which travels in the variant."""
    windows: Windows | None
    """Of the calibration text; None for a recipe that needs none."""
    refinement_windows: Windows | None = None
    """Others of the same text, for a recipe that refines."""
    device: str
    """`cpu` or `cuda`."""

    def identity(self) -> dict[str, object]:
        """Return what the variant's bytes depend on."""
        return {
            "source": self.source.model_dump(mode="json"),
            "recipe": self.recipe.digest(),
            "calibration": _dumped(self.windows.record if self.windows else None),
            "refinement": _dumped(self.refinement_windows.record if self.refinement_windows else None),
            "device": self.device,
            "versions": _versions(self.recipe),
        }


def quantize(job: Job, target: Path, reporter: Reporter, ranks: Ranks | None = None) -> Variant:
    """Make the variant in `target`.

    An interrupted run leaves a journal beside `target`; the same call goes on from it and gives the same bytes.
    A `target` that holds the result of the same job is returned as it is.

    Raises:
        CheckpointError: the base is damaged or not supported.
        RecipeError: the recipe does not fit this model.
        InvalidUsageError: something else is at `target`, or another process is making it.
        QuantizationError: a numeric step or a proof failed; nothing is left at `target`.
    """
    return quantize_together({target: job}, reporter, ranks)[0]


def quantize_together(jobs: Mapping[Path, Job], reporter: Reporter, ranks: Ranks | None = None) -> list[Variant]:
    """Make a variant of one base at each target; those that learn from the same text share one pass over the layers.

    Each has the bytes that `quantize` alone would give it, and the errors are the same.
    """
    from gemma_pack.quantization.journal import remove_journals
    from gemma_pack.quantization.ranks import Ranks

    ranks = ranks or Ranks()
    made: dict[Path, Variant] = {}
    kept: dict[Path, set[str]] = {}
    for target, job in jobs.items():
        ignored = _require_fitting(job)
        existing = read_record(target) if target.is_dir() else None
        if existing and _identity(existing) == job.identity():
            Checkpoint.open(target)
            if ranks.is_first:
                remove_journals(target)
            made[target] = _with_recipe(Variant(target, existing, made_now=False), job, ranks)
        else:
            refuse_existing(target)
            kept[target] = ignored
    with contextlib.ExitStack() as held:
        if ranks.is_first:
            for target in kept:
                held.enter_context(held_alone(target))
                refuse_existing(target)  # another process may just have finished it
            _require_disk(jobs, kept)
        drafts = {
            target: _Draft(jobs[target], frozenset(ignored), _open_journal(target, jobs[target], reporter, ranks))
            for target, ignored in kept.items()
        }
        _round_calibrated(list(drafts.values()), reporter, ranks)
        for target, draft in drafts.items():
            rounded = _finish_rounding(draft, reporter, ranks)
            if ranks.is_first:
                with staged_directory(target) as staging:
                    record = _assemble(draft.job, rounded, set(draft.ignored), staging, reporter)
                draft.journal.close()
            ranks.wait()
            made[target] = Variant(target, record if ranks.is_first else require_record(target), made_now=True)
    return [made[target] for target in jobs]


def _with_recipe(variant: Variant, job: Job, ranks: Ranks) -> Variant:
    """Give a variant that is there the recipe as it reads now, which makes the same bytes.

    Another gate takes the verdict out of the record, since it is not that gate's.
    """
    path = variant.directory / RECIPE_NAME
    if path.is_file() and path.read_bytes() == job.recipe_text.encode():
        return variant
    record = variant.record
    if record.validation and _gate_in(path) != job.recipe.gate:
        record = record.model_copy(update={"validation": None})
    if ranks.is_first:
        record.write(variant.directory)
        write_atomic(path, job.recipe_text)
    return Variant(variant.directory, record, made_now=False, has_new_recipe=True)


def _gate_in(path: Path) -> tuple[GateRow, ...] | None:
    try:
        return load_recipe(str(path)).gate
    except GemmaPackError:  # missing or damaged
        return None


@dataclass(frozen=True, slots=True)
class _Draft:
    """A job under way."""

    job: Job
    ignored: frozenset[str]
    journal: Journal


@dataclass(frozen=True, slots=True)
class _Rounded:
    """What replaces the linears' weights, still in the journal."""

    tensors: list[TensorInfo]
    shards: tuple[Path, ...] = ()
    """Files that hold them as they shall lie in the variant, where there are such already."""
    smoothing: EquivalenceProof | None = None
    refinement: RefinementRecord | None = None


def _require_fitting(job: Job) -> set[str]:
    """Return the linears that stay in bf16; raise where base and recipe do not go together."""
    job.base.require_tokenizer()
    require_supported(job.base.config)
    ignored = ignored_modules(job.base, job.recipe)
    require_divisible(job.base, job.recipe, ignored)
    require_servable(job.base)
    settings, windows = job.recipe.refinement, job.refinement_windows
    if settings and windows and len(windows.ids) <= settings.held_out:
        raise TextError(
            f"{windows.record.spec} fills {len(windows.ids)} windows of {settings.sequence_length} tokens, and "
            f"refinement holds out {settings.held_out} to judge by",
            hint="give a longer calibration text, or a recipe with a lower refinement.held_out",
        )
    return ignored


def _require_disk(jobs: Mapping[Path, Job], ignored: Mapping[Path, set[str]]) -> None:
    """Raise MachineError where a disk lacks room for the variants and, until they are whole, for their journals.

    Args:
        jobs: all that were asked for.
        ignored: for the target of each that is still to be made, the linears that stay in bf16.
    """
    from gemma_pack.quantization.journal import journal_directory

    needed: dict[Path, int] = {}
    for target, names in ignored.items():
        job = jobs[target]
        tensors = variant_tensors(job.base, job.recipe, names)
        copies = 2 if job.recipe.needs_calibration else 1  # else the shards grow in the journal, and are linked
        kept = journal_directory(target, job.identity()).glob("*.safetensors")
        there = min(tensors.packed_bytes, sum(path.stat().st_blocks * 512 for path in kept))  # shards grow by holes
        size_bytes = tensors.untouched_bytes + copies * tensors.packed_bytes - there
        needed[target.parent] = needed.get(target.parent, 0) + size_bytes
    for parent, size_bytes in needed.items():
        require_space(next(iter(ignored)) if len(ignored) == 1 else parent.absolute(), size_bytes)


def _open_journal(target: Path, job: Job, reporter: Reporter, ranks: Ranks) -> Journal:
    from gemma_pack.quantization.journal import Journal

    if ranks.is_first:  # the others must not see it being cleared
        Journal(target, job.identity())
    ranks.wait()
    journal = Journal(target, job.identity())
    if journal.layers():
        reporter.status(f"going on after {len(journal.layers())} finished groups of layers")
    return journal


def _round_calibrated(drafts: Sequence[_Draft], reporter: Reporter, ranks: Ranks) -> None:
    """Fill the journals of those that learn from text, in one pass for each text."""
    from gemma_pack.quantization.calibrated import Draft, quantize_layers

    passes: dict[str, list[_Draft]] = {}
    for draft in drafts:
        if draft.job.windows is not None:
            passes.setdefault(draft.job.windows.record.model_dump_json(), []).append(draft)
    for together in passes.values():
        job = together[0].job
        if job.windows is not None:
            quantize_layers(
                job.base,
                [Draft(draft.job.recipe, draft.ignored, draft.journal) for draft in together],
                job.windows.ids,
                device=torch_device(job.device),
                ranks=ranks,
                reporter=reporter,
            )


def _finish_rounding(draft: _Draft, reporter: Reporter, ranks: Ranks) -> _Rounded:
    """Return what the journal holds, after rounding without text or tuning scales where the recipe says so."""
    from gemma_pack.quantization.calibrated import EQUIVALENCE
    from gemma_pack.quantization.equivalence import TOKENS, WINDOWS
    from gemma_pack.quantization.refinement import refine_scales
    from gemma_pack.quantization.streamed import quantize_streamed

    job, journal = draft.job, draft.journal
    device = torch_device(job.device)
    if job.windows is None:
        if not ranks.is_first:
            return _Rounded([])
        shards = quantize_streamed(
            job.base, job.recipe, ignored=draft.ignored, device=device, journal=journal, reporter=reporter
        )
        return _Rounded([info for path in shards for info in read_header(path)], shards=tuple(shards))
    tensors = {info.name: info for path in journal.layers() for info in read_header(path)}
    smoothing = None
    if job.recipe.smoothing and (proof := journal.load(EQUIVALENCE)):
        smoothing = EquivalenceProof(windows=WINDOWS, tokens_a_window=TOKENS, kl_nats=float(proof["kl_nats"]))
    if job.refinement_windows is None:
        return _Rounded(list(tensors.values()), smoothing=smoothing)
    tuned = refine_scales(
        job.base, job.recipe, job.refinement_windows.ids, device=device, ranks=ranks, journal=journal, reporter=reporter
    )
    tensors |= {info.name: info for info in read_header(journal.path(REFINED))}
    refinement = RefinementRecord(
        text=job.refinement_windows.record,
        steps=tuned.step,
        held_out_kl_before_nats=tuned.kl_before_nats,
        held_out_kl_after_nats=tuned.kl_after_nats,
    )
    return _Rounded(list(tensors.values()), smoothing=smoothing, refinement=refinement)


def torch_device(name: str) -> torch.device:
    """Return torch's device: under torchrun each process has the GPU that `join_ranks` gave it."""
    import torch

    return torch.device(name)


def _assemble(job: Job, rounded: _Rounded, ignored: set[str], staging: Path, reporter: Reporter) -> Record:
    """Write all files of the variant into `staging`, prove the rest untouched and return the record."""
    from gemma_pack.quantization.scheme import describe, quantization_config

    base, recipe = job.base, job.recipe
    changed = _changed(job, ignored)
    copy_shards(staging, "untouched", [base.tensors[name] for name in sorted(set(base.tensors) - changed)])
    if rounded.shards:
        link_shards(staging, rounded.shards)
    else:
        copy_shards(staging, "quantized", rounded.tensors)
    write_index(staging, [info for path in sorted(staging.glob("*.safetensors")) for info in read_header(path)])
    config = {**base.config, "quantization_config": quantization_config(recipe, _left_in_bf16(base, ignored))}
    (staging / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (staging / RECIPE_NAME).write_text(job.recipe_text, "utf-8")
    for path in base.companions():
        if path.name not in ("config.json", RECIPE_NAME, "README.md"):
            shutil.copyfile(path, staging / path.name)
    variant = Checkpoint.open(staging)
    loader = prove_loadable(variant, recipe)
    proof = prove_untouched(base, variant, changed, [info.name for info in rounded.tensors], reporter)
    made = QuantizationRecord(
        recipe=recipe.name,
        recipe_sha256=recipe.digest(),
        scheme=describe(recipe),
        algorithm=recipe.algorithm,
        format="bitsandbytes" if recipe.for_bitsandbytes else "compressed-tensors",
        calibration=job.windows.record if job.windows else None,
        smoothing=rounded.smoothing,
        refinement=rounded.refinement,
        device=job.device,
        versions=_versions(recipe),
        untouched=proof,
        loader=loader,
        base_size_bytes=base.size_bytes,
        size_bytes=variant.size_bytes,
    )
    record = Record(source=job.source, quantization=made)
    record.write(staging)
    return record


def _changed(job: Job, ignored: set[str]) -> set[str]:
    """Return the tensors of the base that the recipe replaces, and copies of the embedding, which are dropped."""
    from gemma_pack.quantization.transforms import norm_of

    groups = [group for group in linear_groups(job.base) if group[0] not in ignored]
    norms = [norm_of(group) for group in groups] if job.recipe.smoothing else []
    changed = {f"{name}.weight" for group in groups for name in group} | {norm for norm in norms if norm}
    return changed | copied_heads(job.base)


def _left_in_bf16(base: Checkpoint, ignored: set[str]) -> list[str]:
    """Return the ignore list of config.json, by every name that a reader may ask for."""
    heads = {"lm_head", *(name.removesuffix(".weight") for name in stored_heads(base))}
    linears = ignored | set(map(fused_values, ignored))
    towers = [f"re:.*{tower}.*" for tower in TOWERS if any(tower in name for name in base.tensors)]
    return [*sorted(heads), *(spelling for name in sorted(linears) for spelling in spellings(name)), *towers]


def _identity(record: Record) -> Mapping[str, object] | None:
    """Return the `Job.identity` of the job that left this record."""
    made = record.quantization
    if made is None:
        return None
    return {
        "source": record.source.model_dump(mode="json"),
        "recipe": made.recipe_sha256,
        "calibration": _dumped(made.calibration),
        "refinement": _dumped(made.refinement.text if made.refinement else None),
        "device": made.device,
        "versions": made.versions,
    }


def _dumped(text: TextRecord | None) -> dict[str, object] | None:
    return text.model_dump(mode="json") if text else None


def _versions(recipe: Recipe) -> dict[str, str]:
    """Return the versions of the libraries that shape the bytes."""
    libraries = ("torch", "bitsandbytes") if recipe.for_bitsandbytes else _LIBRARIES
    return {name: importlib.metadata.version(name) for name in libraries}
