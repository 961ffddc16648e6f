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
from gemma_pack.evaluation.audit import audit_weights, judge_audit
from gemma_pack.evaluation.comparable import require_same_base, require_same_language
from gemma_pack.evaluation.engines.in_process import load, require_memory
from gemma_pack.evaluation.engines.reading import ResidentReader
from gemma_pack.evaluation.likelihood import check_bos, measure_noise, score
from gemma_pack.evaluation.measures import collect_metrics, measure_divergence, measure_likelihood, sum_windows
from gemma_pack.evaluation.parity import compare_answers
from gemma_pack.evaluation.prompts import build_prompts
from gemma_pack.evaluation.served import Measured, Pair, measure_served
from gemma_pack.evaluation.tasks import compare_tasks, run_tasks
from gemma_pack.record import FileDigest
from gemma_pack.report import Base, BosCheck, Engine, Method, Protocol, Report, Subject
from gemma_pack.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.engines.in_process import Model
    from gemma_pack.evaluation.engines.reading import Reader
    from gemma_pack.evaluation.profiles import Profile
    from gemma_pack.evaluation.served import Servers
    from gemma_pack.evaluation.tasks import TaskChoice
    from gemma_pack.recipe import Recipe
    from gemma_pack.record import QuantizationRecord, Record, SourceRecord
    from gemma_pack.report import WeightAudit
    from gemma_pack.task_results import SkippedTask, TaskScores
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
    servers: Servers | None = None
    """The servers that compute; None computes in this process."""
    tasks: TaskChoice | None = None


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
    audit = _audit(comparison, base_checkpoint, variant_checkpoint, reporter)
    tokenizer, _ = load_tokenizer(comparison.base)

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    subject = _describe_variant(comparison.record, variant_checkpoint, reporter)
    measured = _measure(comparison, subject, base_checkpoint.size_bytes, decode, reporter)
    noise_floor, parity = measured.noise_floor, measured.parity
    likelihood = measure_likelihood(measured.scores, comparison.windows.text_bytes, comparison.seed)
    divergence = measure_divergence(measured.scores, ids, decode, comparison.seed, measured.top_k)
    estimates = (likelihood.ln_ratio, divergence.kl_nats, divergence.same_top1)
    judged = (*gate.judge_costs(*estimates, row, len(ids)), *judge_audit(audit))
    metrics = collect_metrics(noise_floor, likelihood, divergence, parity, judged)
    verdict = gate.overall(metrics)
    return Report(
        verdict=verdict,
        windows_needed=gate.windows_needed(*estimates, row, len(ids)) if verdict == "undecided" else None,
        subject=subject,
        base=_describe_base(comparison.base_source, base_checkpoint),
        engine=measured.engine,
        protocol=_protocol(comparison, measured.bos_check),
        method=Method(confidence=statistics.CONFIDENCE, draws=statistics.DRAWS, seed=comparison.seed),
        metrics=metrics,
        noise_floor=noise_floor,
        likelihood=likelihood,
        divergence=divergence,
        parity=parity,
        audit=audit,
        tasks=compare_tasks(comparison.tasks, *measured.tasks) if comparison.tasks and measured.tasks else None,
        windows=sum_windows(measured.scores),
    )


def _measure(
    comparison: Comparison,
    subject: Subject,
    base_size_bytes: int,
    decode: Callable[[Sequence[int]], str],
    reporter: Reporter,
) -> Measured:
    """Measure both models by the engine that was chosen."""
    ids, limit = comparison.windows.ids, comparison.profile.answer_tokens
    prompts = build_prompts(comparison.base, comparison.profile.prompts, ids)
    ask = _asker(comparison, subject, reporter)
    if comparison.servers:
        pair = Pair(
            base=comparison.base,
            variant=comparison.variant,
            base_files=comparison.base_source.files,
            variant_files=subject.files,
            base_size_bytes=base_size_bytes,
            device=comparison.device,
        )
        return measure_served(
            comparison.servers,
            pair,
            ids,
            prompts,
            limit=limit,
            decode=decode,
            describe=_describe_engine,
            ask=ask,
            reporter=reporter,
        )
    require_memory(2 * base_size_bytes, comparison.device)  # the variant is dequantized to bf16
    reporter.status(f"loading base and variant on {comparison.device}")
    base = load(comparison.base, "base", comparison.device)
    variant = load(comparison.variant, "variant", comparison.device)
    bos_check = check_bos(base, ids)
    reporter.status("measuring the noise floor: the base against itself")
    return Measured(
        bos_check=bos_check,
        noise_floor=measure_noise(base, ids),
        scores=score(base, variant, ids, reporter),
        top_k=None,
        parity=compare_answers(base, variant, prompts, limit=limit, decode=decode, reporter=reporter),
        engine=_describe_engine(base),
        tasks=(ask(ResidentReader(base, _describe_engine)), ask(ResidentReader(variant, _describe_engine)))
        if ask
        else None,
    )


def _asker(
    comparison: Comparison, subject: Subject, reporter: Reporter
) -> Callable[[Reader], dict[str, TaskScores | SkippedTask]] | None:
    """Return what runs the tasks on a reader; None where there are none."""
    choice = comparison.tasks
    if choice is None:
        return None

    def ask(reader: Reader) -> dict[str, TaskScores | SkippedTask]:
        files = subject.files if reader.role == "variant" else comparison.base_source.files
        key = " ".join([reader.describe().name, *(file.sha256 for file in files)])
        return run_tasks(choice, reader, key=key, directory=comparison.base, reporter=reporter)

    return ask


def _audit(comparison: Comparison, base: Checkpoint, variant: Checkpoint, reporter: Reporter) -> WeightAudit | None:
    """Audit the weights before anything is loaded, and say at once what was found."""
    record = _quantization(comparison.record, variant)
    audit = audit_weights(base, variant, record, device=comparison.device, reporter=reporter)
    damaged = [module.name for module in audit.modules if module.problem] + list(audit.altered) if audit else []
    if damaged:
        reporter.warn(f"the weight audit fails at {damaged[0]}{f' and {len(damaged) - 1} more' if damaged[1:] else ''}")
    return audit


def _quantization(record: Record, checkpoint: Checkpoint) -> QuantizationRecord:
    if record.quantization is None:
        raise CheckpointError(f"{checkpoint.directory} is no variant: its record has no quantization")
    return record.quantization


def _describe_variant(record: Record, checkpoint: Checkpoint, reporter: Reporter) -> Subject:
    quantization = _quantization(record, checkpoint)
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
