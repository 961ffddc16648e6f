"""Validates a variant against its base: measures, judges, and fills the report.

The order matters: what cannot be compared is refused before a weight is loaded, and the check of <bos> on the base
comes before any comparison.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_pack.checkpoint import Checkpoint, file_sha256
from gemma_pack.errors import CheckpointError, TextError
from gemma_pack.evaluation import gate, statistics
from gemma_pack.evaluation.comparable import require_same_base, require_same_language
from gemma_pack.evaluation.engines.in_process import load, require_memory
from gemma_pack.evaluation.likelihood import check_bos, measure_noise, score
from gemma_pack.evaluation.measures import collect_metrics, measure_divergence, measure_likelihood, sum_windows
from gemma_pack.evaluation.parity import compare_answers
from gemma_pack.evaluation.prompts import build_prompts
from gemma_pack.record import FileDigest
from gemma_pack.report import Base, BosCheck, Engine, Method, Protocol, Report, Subject
from gemma_pack.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.engines.in_process import Model
    from gemma_pack.evaluation.profiles import Profile
    from gemma_pack.recipe import Recipe
    from gemma_pack.record import Record, SourceRecord
    from gemma_pack.texts import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is validated, against what, on which windows, by which gate."""

    variant: Path
    record: Record
    """The variant's, with a quantization."""
    base: Path
    base_source: SourceRecord
    recipe: Recipe
    windows: Windows
    profile: Profile
    device: str
    seed: int
    """Of the bootstrap."""


def validate(comparison: Comparison, reporter: Reporter) -> Report:
    """Measure what quantization cost and judge it.

    Raises:
        TextError: there is but one window.
        CheckpointError: variant and base cannot be compared, or one is damaged.
        MachineError: they do not fit into memory, or the baseline is broken.
        QuantizationError: a model computes NaN or infinity.
    """
    ids = comparison.windows.ids
    if len(ids) < 2:
        raise TextError(
            f"{comparison.windows.record.spec} fills one window, and a spread needs two at least",
            hint="choose a longer text; a verdict needs 32 windows",
        )
    require_same_base(comparison.record.source, comparison.base_source)
    require_same_language(comparison.variant, comparison.base)
    variant_checkpoint, base_checkpoint = Checkpoint.open(comparison.variant), Checkpoint.open(comparison.base)
    row = comparison.recipe.gate_for(sum(tensor.parameters for tensor in base_checkpoint.tensors.values()))
    require_memory(2 * base_checkpoint.size_bytes, comparison.device)  # the variant is dequantized to bf16
    reporter.status(f"loading base and variant on {comparison.device}")
    base = load(comparison.base, "base", comparison.device)
    variant = load(comparison.variant, "variant", comparison.device)

    bos_check = check_bos(base, ids)
    reporter.status("measuring the noise floor: the base against itself")
    noise_floor = measure_noise(base, ids)
    scores = score(base, variant, ids, reporter)
    tokenizer, _ = load_tokenizer(comparison.base)

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    prompts = build_prompts(comparison.base, comparison.profile.prompts, ids)
    parity = compare_answers(
        base, variant, prompts, limit=comparison.profile.answer_tokens, decode=decode, reporter=reporter
    )

    likelihood = measure_likelihood(scores, comparison.windows.text_bytes, comparison.seed)
    divergence = measure_divergence(scores, ids, decode, comparison.seed)
    estimates = (likelihood.ln_ratio, divergence.kl_nats, divergence.same_top1)
    judged = gate.judge_costs(*estimates, row, len(ids))
    metrics = collect_metrics(noise_floor, likelihood, divergence, parity, judged)
    verdict = gate.overall(metrics)
    return Report(
        verdict=verdict,
        windows_needed=gate.windows_needed(*estimates, row, len(ids)) if verdict == "undecided" else None,
        subject=_describe_variant(comparison.record, variant_checkpoint, reporter),
        base=_describe_base(comparison.base_source, base_checkpoint),
        engine=_describe_engine(base),
        protocol=_protocol(comparison, bos_check),
        method=Method(confidence=statistics.CONFIDENCE, draws=statistics.DRAWS, seed=comparison.seed),
        metrics=metrics,
        noise_floor=noise_floor,
        likelihood=likelihood,
        divergence=divergence,
        parity=parity,
        windows=sum_windows(scores),
    )


def _describe_variant(record: Record, checkpoint: Checkpoint, reporter: Reporter) -> Subject:
    quantization = record.quantization
    if quantization is None:
        raise CheckpointError(f"{checkpoint.directory} is no variant: its record has no quantization")
    total = sum(path.stat().st_size for path in checkpoint.shards)
    with reporter.progress("Hashing the variant", total, "bytes") as task:
        files = tuple(
            FileDigest(path=path.name, sha256=file_sha256(path, task.advance), size_bytes=path.stat().st_size)
            for path in checkpoint.shards
        )
    return Subject(
        recipe=quantization.recipe,
        recipe_sha256=quantization.recipe_sha256,
        scheme=quantization.scheme,
        size_bytes=checkpoint.size_bytes,
        files=files,
    )


def _describe_base(source: SourceRecord, checkpoint: Checkpoint) -> Base:
    return Base(
        kind=source.kind,
        model_id=source.model_id,
        revision=source.revision,
        note=source.note,
        parameters=sum(tensor.parameters for tensor in checkpoint.tensors.values()),
        size_bytes=checkpoint.size_bytes,
    )


def _describe_engine(model: Model) -> Engine:
    import torch

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    libraries = ("torch", "transformers", "compressed-tensors", "tokenizers")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return Engine(name="transformers", versions=versions, device=device, attention=model.attention)


def _protocol(comparison: Comparison, bos_check: BosCheck) -> Protocol:
    windows = comparison.windows
    return Protocol(
        profile=comparison.profile.name,
        text=windows.record,
        tokens=windows.ids[:, 1:].size,
        text_bytes=int(windows.text_bytes.sum()),
        bos_check=bos_check,
    )
