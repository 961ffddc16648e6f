"""From a checkpoint and a recipe to a variant on disk: whole, proved and recorded, or not there at all."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gemma_pack.checkpoint import Checkpoint, write_index
from gemma_pack.disk import refuse_existing, staged_directory
from gemma_pack.errors import CheckpointError, RecipeError
from gemma_pack.gemma import decoder_linears, decoder_prefix, require_supported
from gemma_pack.quantization.untouched import prove_untouched
from gemma_pack.record import QuantizationRecord, Record, RefinementRecord, read_record
from gemma_pack.safetensors_file import TensorInfo, read_header, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.journal import Journal
    from gemma_pack.recipe import Recipe
    from gemma_pack.record import SourceRecord, TextRecord
    from gemma_pack.texts import Windows

MAX_SHARD_BYTES: Final = 4_000_000_000
"""Registries take layers of 10 GB at most, pulls run in parallel, and a broken one is repeated: small shards."""
RECIPE_NAME: Final = "recipe.yaml"
REFINED: Final = "refined"
_LIBRARIES: Final = ("torch", "transformers", "llmcompressor", "compressed-tensors")
_TOWERS: Final = ("vision_tower", "multi_modal_projector")


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant on disk, and whether this call made it."""

    directory: Path
    record: Record
    made_now: bool


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
            "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }


def quantize(job: Job, target: Path, reporter: Reporter) -> Variant:
    """Make the variant in `target`.

    An interrupted run leaves a journal beside `target`; the same call goes on from it and gives the same bytes.
    A `target` that holds the result of the same job is returned as it is.

    Raises:
        CheckpointError: the base is damaged or not supported.
        RecipeError: the recipe does not fit this model.
        InvalidUsageError: something else is at `target`.
        QuantizationError: a numeric step or the untouched proof failed; nothing is left at `target`.
    """
    job.base.require_tokenizer()
    require_supported(job.base.config)
    ignored = ignored_modules(job.base, job.recipe)
    _require_divisible(job.base, job.recipe, ignored)
    existing = read_record(target) if target.is_dir() else None
    if existing and _identity(existing) == job.identity():
        Checkpoint.open(target)
        return Variant(target, existing, made_now=False)
    refuse_existing(target)

    from gemma_pack.quantization.journal import Journal

    journal = Journal(target, job.identity())
    if journal.layers():
        reporter.status(f"going on after {len(journal.layers())} finished layers")
    rounded = _round(job, ignored, journal, reporter)
    with staged_directory(target) as staging:
        record = _assemble(job, rounded, ignored, staging, reporter)
    journal.close()
    return Variant(target, record, made_now=True)


@dataclass(frozen=True, slots=True)
class _Rounded:
    """What replaces the linears' weights, still in the journal."""

    tensors: list[TensorInfo]
    refinement: RefinementRecord | None = None


def _round(job: Job, ignored: set[str], journal: Journal, reporter: Reporter) -> _Rounded:
    """Fill the journal by the path that the recipe needs, and tune the scales if it says so."""
    import torch

    from gemma_pack.quantization.calibrated import quantize_layers
    from gemma_pack.quantization.refinement import refine_scales
    from gemma_pack.quantization.streamed import quantize_streamed

    device = torch.device(job.device)
    if job.windows is None:
        quantize_streamed(job.base, job.recipe, ignored=ignored, device=device, journal=journal, reporter=reporter)
        return _Rounded([info for path in journal.layers() for info in read_header(path)])
    quantize_layers(
        job.base, job.recipe, job.windows.ids, ignored=ignored, device=device, journal=journal, reporter=reporter
    )
    tensors = {info.name: info for path in journal.layers() for info in read_header(path)}
    if job.refinement_windows is None:
        return _Rounded(list(tensors.values()))
    tuned = refine_scales(
        job.base, job.recipe, job.refinement_windows.ids, device=device, journal=journal, reporter=reporter
    )
    tensors |= {info.name: info for info in read_header(journal.path(REFINED))}
    refinement = RefinementRecord(
        text=job.refinement_windows.record,
        steps=tuned.step,
        held_out_kl_before_nats=tuned.kl_before_nats,
        held_out_kl_after_nats=tuned.kl_after_nats,
    )
    return _Rounded(list(tensors.values()), refinement)


def ignored_modules(checkpoint: Checkpoint, recipe: Recipe) -> set[str]:
    """Return the decoder linears that the recipe's `ignore` names.

    Raises:
        RecipeError: an entry matches nothing, or splits layers that a server fuses into one matrix.
    """
    groups = _linear_groups(checkpoint)
    names = [name for group in groups for name in group]
    ignored: set[str] = set()
    for entry in recipe.ignore:
        pattern = entry.removeprefix("re:") if entry.startswith("re:") else re.escape(entry)
        found = {name for name in names if re.fullmatch(pattern, name)}
        if not found:
            raise RecipeError(
                f"ignore: {entry} of recipe {recipe.name} matches no linear layer of this model",
                hint=f"layer names look like {names[0]}; embeddings and head are left alone anyway",
            )
        ignored |= found
    for group in groups:
        if ignored.intersection(group) and not ignored.issuperset(group):
            raise RecipeError(
                f"recipe {recipe.name} ignores a part of {', '.join(group)}, which servers fuse into one matrix",
                hint="ignore all of them or none",
            )
    return ignored


def _assemble(job: Job, rounded: _Rounded, ignored: set[str], staging: Path, reporter: Reporter) -> Record:
    """Write all files of the variant into `staging`, prove the rest untouched and return the record."""
    from gemma_pack.quantization.scheme import describe, quantization_config

    base, recipe = job.base, job.recipe
    changed = {f"{name}.weight" for group in _linear_groups(base) for name in group if name not in ignored}
    _write_shards(staging, "untouched", [base.tensors[name] for name in sorted(set(base.tensors) - changed)])
    _write_shards(staging, "quantized", rounded.tensors)
    write_index(staging, [info for path in sorted(staging.glob("*.safetensors")) for info in read_header(path)])
    towers = [f"re:.*{tower}.*" for tower in _TOWERS if any(tower in name for name in base.tensors)]
    in_bf16 = ["lm_head", *sorted(ignored), *towers]
    config = {**base.config, "quantization_config": quantization_config(recipe, in_bf16)}
    (staging / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (staging / RECIPE_NAME).write_text(job.recipe_text, "utf-8")
    for path in base.companions():
        if path.name not in ("config.json", RECIPE_NAME, "README.md"):
            shutil.copyfile(path, staging / path.name)
    variant = Checkpoint.open(staging)
    proof = prove_untouched(base, variant, changed, [info.name for info in rounded.tensors], reporter)
    made = QuantizationRecord(
        recipe=recipe.name,
        recipe_sha256=recipe.digest(),
        scheme=describe(recipe),
        algorithm=recipe.algorithm,
        calibration=job.windows.record if job.windows else None,
        refinement=rounded.refinement,
        device=job.device,
        versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
        untouched=proof,
        base_size_bytes=base.size_bytes,
        size_bytes=variant.size_bytes,
    )
    record = Record(source=job.source, quantization=made)
    record.write(staging)
    return record


def _linear_groups(checkpoint: Checkpoint) -> list[list[str]]:
    layers = decoder_linears(checkpoint.config, decoder_prefix(checkpoint.tensors))
    return [group for layer in layers for group in layer]


def _require_divisible(checkpoint: Checkpoint, recipe: Recipe, ignored: set[str]) -> None:
    """Raise unless the groups divide the input columns of every layer to be quantized."""
    size = recipe.columns_divisor
    for name in (name for group in _linear_groups(checkpoint) for name in group if name not in ignored):
        info = checkpoint.tensors.get(f"{name}.weight")
        if info is None:
            raise CheckpointError(
                f"{checkpoint.directory} has no tensor {name}.weight, which config.json promises",
                hint="fetch the checkpoint again",
            )
        if info.shape[1] % size:
            raise RecipeError(
                f"{name} has {info.shape[1]} input columns, which groups of {size} do not divide",
                hint="use a recipe with smaller groups",
            )


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


def _write_shards(directory: Path, kind: str, infos: Iterable[TensorInfo]) -> None:
    """Copy tensors into `model-<kind>-<number>.safetensors`, each with at most `MAX_SHARD_BYTES` of data.

    The names do not count the shards, and untouched tensors have shards of their own: variants of one model then
    share those files byte for byte, and a registry stores them once.
    """
    shards: list[list[TensorInfo]] = [[]]
    for info in infos:
        if shards[-1] and sum(other.size_bytes for other in shards[-1]) + info.size_bytes > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(info)
    for number, shard in enumerate(shards, start=1):
        write_safetensors(
            directory / f"model-{kind}-{number:05}.safetensors",
            [(info.name, info.dtype, info.shape, info.read) for info in shard],
        )
