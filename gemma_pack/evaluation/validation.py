"""Validates a variant against its base: measures, judges, and fills the report.

The order matters: what cannot be compared is refused before a weight is loaded, and the check of <bos> on the base
comes before any comparison. An undecided run may look once more, at more windows; then both looks have half of the
5 % that a verdict may be wrong by (Bonferroni), so that looking twice makes no verdict less sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import TextError
from gemma_pack.evaluation import gate, statistics
from gemma_pack.evaluation.audit import audit_weights, judge_audit
from gemma_pack.evaluation.comparable import require_same_base, require_same_language
from gemma_pack.evaluation.description import describe_base, describe_engine, describe_variant, quantization_of
from gemma_pack.evaluation.measured import Pair
from gemma_pack.evaluation.measures import collect_metrics, measure_divergence, measure_likelihood, sum_windows
from gemma_pack.evaluation.prompts import build_prompts
from gemma_pack.evaluation.resident import resident_engine
from gemma_pack.evaluation.served import Served, require_answering
from gemma_pack.evaluation.tasks import compare_tasks, run_tasks
from gemma_pack.report import GateUsed, Method, OtherProtocol, Protocol, Report
from gemma_pack.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from gemma_pack.audit_results import WeightAudit
    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.engines.reading import Reader
    from gemma_pack.evaluation.likelihood import TokenScores
    from gemma_pack.evaluation.measured import Measured, Measuring
    from gemma_pack.evaluation.profiles import Profile
    from gemma_pack.evaluation.served import Servers
    from gemma_pack.evaluation.tasks import TaskChoice
    from gemma_pack.recipe import GateRow, Recipe
    from gemma_pack.record import Metric, Record, SourceRecord
    from gemma_pack.report import Divergence, Likelihood, Subject, TopK
    from gemma_pack.task_results import SkippedTask, TaskScores
    from gemma_pack.texts import Windows

MOST_TIMES: Final = 8
"""A second look takes at most so many times the windows of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is validated, against what, on which windows, by which gate."""

    variant: Path
    record: Record
    """The variant's, with a quantization."""
    base: Path
    base_source: SourceRecord
    recipe: Recipe
    margins: Mapping[str, float]
    """What the gate allows instead of what the recipe says, by measure."""
    windows: Windows
    profile: Profile
    device: str
    seed: int
    """Of the bootstrap."""
    kept: Path
    """A directory for what an interrupted run need not do again."""
    extend: Callable[[int], Windows] | None = None
    """Returns so many windows, those that there are among them, for a second look; None looks once."""
    gptq_windows: Windows | None = None
    """WikiText-2 as papers cut it, where perplexity by that protocol is wanted, too."""
    servers: Servers | None = None
    """The servers that compute; None computes in this process."""
    tasks: TaskChoice | None = None

    @property
    def confidence(self) -> float:
        """One-sided, of every bound."""
        looks = 2 if self.extend else 1
        return 1 - (1 - statistics.CONFIDENCE) / looks


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What the windows say, judged."""

    windows: Windows
    scores: TokenScores
    likelihood: Likelihood
    divergence: Divergence
    costs: tuple[Metric, ...]
    needed: int | None


def validate(comparison: Comparison, reporter: Reporter) -> Report:
    """Measure what quantization cost and judge it.

    Raises:
        TextError: there is but one window.
        InvalidUsageError: a margin is of no measure.
        CheckpointError: variant and base cannot be compared, or one is damaged.
        MachineError: they do not fit into memory, or the baseline is broken.
        QuantizationError: a model computes NaN or infinity.
    """
    if len(comparison.windows.ids) < 2:
        raise TextError(
            f"{comparison.windows.record.spec} fills one window, and a spread needs two at least",
            hint="choose a longer text; a verdict needs 32 windows",
        )
    require_same_base(comparison.record.source, comparison.base_source)
    require_same_language(comparison.variant, comparison.base)
    variant_checkpoint, base_checkpoint = Checkpoint.open(comparison.variant), Checkpoint.open(comparison.base)
    row = comparison.recipe.gate_for(sum(tensor.parameters for tensor in base_checkpoint.tensors.values()))
    row = gate.overridden(row, comparison.margins)
    if comparison.servers:
        others = [comparison.gptq_windows.ids] if comparison.gptq_windows else []
        require_answering(comparison.servers, max(ids.shape[1] for ids in [comparison.windows.ids, *others]))
    audit = _audit(comparison, base_checkpoint, variant_checkpoint, reporter)
    subject = describe_variant(comparison.record, variant_checkpoint, reporter)
    pair = _pair(comparison, subject, base_checkpoint.size_bytes, reporter)
    engine = Served(comparison.servers, pair) if comparison.servers else resident_engine(pair)
    windows = comparison.windows
    measured = engine.measure(windows.ids, build_prompts(comparison.base, comparison.profile.prompts, windows.ids))
    look = _look(comparison, pair, row, windows, (measured.scores, measured.top_k))
    if comparison.extend and gate.overall((*look.costs, *judge_audit(audit))) == "undecided":
        look = _look_again(comparison, pair, row, look, engine)
    metrics = collect_metrics(
        measured.noise_floor, look.likelihood, look.divergence, measured.parity, (*look.costs, *judge_audit(audit))
    )
    verdict = gate.overall(metrics)
    return Report(
        verdict=verdict,
        windows_needed=look.needed if verdict == "undecided" else None,
        subject=subject,
        base=describe_base(comparison.base_source, base_checkpoint),
        engine=measured.engine,
        protocol=_protocol(comparison, look, measured),
        method=Method(confidence=comparison.confidence, draws=statistics.DRAWS, seed=comparison.seed),
        gate=_gate(comparison, row),
        metrics=metrics,
        noise_floor=measured.noise_floor,
        likelihood=look.likelihood,
        divergence=look.divergence,
        parity=measured.parity,
        other_protocols=_other_protocols(comparison, engine),
        audit=audit,
        tasks=compare_tasks(comparison.tasks, *measured.tasks) if comparison.tasks and measured.tasks else None,
        windows=sum_windows(look.scores),
    )


def _look(
    comparison: Comparison, pair: Pair, row: GateRow, windows: Windows, scored: tuple[TokenScores, TopK | None]
) -> _Look:
    """Judge what the scores of the windows say."""
    scores, top_k = scored
    confidence, count = comparison.confidence, len(windows.ids)
    likelihood = measure_likelihood(scores, windows.text_bytes, comparison.seed, confidence=confidence)
    divergence = measure_divergence(scores, windows.ids, pair.decode, comparison.seed, top_k, confidence=confidence)
    estimates = (likelihood.ln_ratio, divergence.kl_nats, divergence.same_top1)
    return _Look(
        windows=windows,
        scores=scores,
        likelihood=likelihood,
        divergence=divergence,
        costs=gate.judge_costs(*estimates, row, count),
        needed=gate.windows_needed(*estimates, row, count, confidence=confidence),
    )


def _look_again(comparison: Comparison, pair: Pair, row: GateRow, first: _Look, engine: Measuring) -> _Look:
    """Take as many more windows as would likely decide it, if the text has them."""
    if comparison.extend is None:
        raise AssertionError("asked for before")
    count = len(first.windows.ids)
    most = MOST_TIMES * count
    windows = comparison.extend(min(first.needed or most, most))
    if len(windows.ids) <= count:
        pair.reporter.warn(f"{windows.record.spec} has no more than {count} windows, so the verdict stays undecided")
        return first
    pair.reporter.warn(f"{count} windows leave it undecided; taking {len(windows.ids)}")
    return _look(comparison, pair, row, windows, engine.rescore(windows.ids))


def _other_protocols(comparison: Comparison, engine: Measuring) -> tuple[OtherProtocol, ...] | None:
    windows = comparison.gptq_windows
    if windows is None:
        return None
    scores, _ = engine.rescore(windows.ids)
    found = measure_likelihood(scores, windows.text_bytes, comparison.seed, confidence=comparison.confidence)
    return (
        OtherProtocol(
            name="wikitext2-gptq",
            text=windows.record,
            tokens=windows.ids[:, 1:].size,
            ppl_base=found.ppl_base,
            ppl_variant=found.ppl_variant,
            ln_ratio=found.ln_ratio,
        ),
    )


def _pair(comparison: Comparison, subject: Subject, base_size_bytes: int, reporter: Reporter) -> Pair:
    tokenizer, _ = load_tokenizer(comparison.base)

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    return Pair(
        base=comparison.base,
        variant=comparison.variant,
        base_files=comparison.base_source.files,
        variant_files=subject.files,
        base_size_bytes=base_size_bytes,
        device=comparison.device,
        answer_tokens=comparison.profile.answer_tokens,
        kept=comparison.kept,
        decode=decode,
        describe=describe_engine,
        ask=_asker(comparison, subject, reporter),
        reporter=reporter,
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
        engine = reader.describe()
        key = " ".join([engine.name, engine.device, *(file.sha256 for file in files)])
        return run_tasks(choice, reader, key=key, directory=comparison.base, reporter=reporter)

    return ask


def _audit(comparison: Comparison, base: Checkpoint, variant: Checkpoint, reporter: Reporter) -> WeightAudit | None:
    """Audit the weights before anything is loaded, and say at once what was found."""
    record = quantization_of(comparison.record, variant)
    audit = audit_weights(base, variant, record, device=comparison.device, reporter=reporter)
    damaged = [module.name for module in audit.modules if module.problem] + list(audit.altered) if audit else []
    if damaged:
        reporter.warn(f"the weight audit fails at {damaged[0]}{f' and {len(damaged) - 1} more' if damaged[1:] else ''}")
    return audit


def _gate(comparison: Comparison, row: GateRow) -> GateUsed:
    margins = row.model_dump(exclude={"up_to_parameters"}, exclude_none=True)
    return GateUsed(recipe=comparison.recipe.name, margins=margins, overridden=tuple(sorted(comparison.margins)))


def _protocol(comparison: Comparison, look: _Look, measured: Measured) -> Protocol:
    windows, first = look.windows, comparison.windows
    return Protocol(
        profile=comparison.profile.name,
        text=windows.record,
        tokens=windows.ids[:, 1:].size,
        text_bytes=int(windows.text_bytes.sum()),
        bos_check=measured.bos_check,
        first_look_windows=None if windows is first else len(first.ids),
    )
