"""How measured numbers read: one label, one unit and one precision for each, in every rendering.

Markdown, card, page and table take their words from here, so that a number never has two names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gemma_pack.report import MINIMUM_WINDOWS

if TYPE_CHECKING:
    from gemma_pack.audit_results import WeightAudit
    from gemma_pack.changes import Change
    from gemma_pack.record import Metric
    from gemma_pack.report import Report


@dataclass(frozen=True, slots=True)
class Wording:
    """A label and how its number is written."""

    label: str
    decimals: int
    higher_is_better: bool = False


WORDINGS: Final[dict[str, Wording]] = {
    "noise_kl_nats": Wording("noise floor of KL", 4),
    "noise_same_top1_percent": Wording("noise floor of first choice", 2, higher_is_better=True),
    "noise_kernel_kl_nats": Wording("noise floor of KL, other kernel", 4),
    "ppl_base": Wording("perplexity of the base", 3),
    "ppl_variant": Wording("perplexity of the variant", 3),
    "ppl_increase_percent": Wording("perplexity increase", 2),
    "ln_ratio_nats": Wording("ln(perplexity ratio)", 4),
    "nll_nats": Wording("variant's mean -ln p", 4),
    "bits_per_byte_base": Wording("bits per byte of the base", 4),
    "bits_per_byte_variant": Wording("bits per byte of the variant", 4),
    "kl_nats": Wording("mean KL(base‖variant)", 4),
    "kl_lower_bound_nats": Wording("KL of tokens seen, lower bound", 4),
    "share_outside_top_k_percent": Wording("probability of tokens unseen", 1),
    "kl_p99_nats": Wording("99th percentile of KL", 3),
    "same_top1_percent": Wording("same first choice", 2, higher_is_better=True),
    "delta_p_rms_percent": Wording("RMS Δp of the read token", 2),
    "greedy_identical_percent": Wording("identical greedy answers", 1, higher_is_better=True),
    "greedy_divergent_percent": Wording("divergent tokens in answers", 1),
    "repeated_4grams_percent": Wording("repeated 4-grams in answers", 1),
    "unended_answers": Wording("answers only the base ended", 0),
    "empty_answers": Wording("empty answers", 0),
    "damaged_layers": Wording("damaged layers", 0),
    "altered_tensors": Wording("altered tensors", 0),
}

VERDICT_WORDS: Final = {"pass": "PASS", "fail": "FAIL", "undecided": "UNDECIDED", "not judged": ""}
OUTCOME_WORDS: Final = {**VERDICT_WORDS, "error": "ERROR"}
"""Of a variant of a build, which may have come to no verdict."""


def label(metric: Metric) -> str:
    """Return the metric's name for people."""
    wording = WORDINGS.get(metric.name)
    return wording.label if wording else metric.name.replace("_", " ")


def value(metric: Metric) -> str:
    """Return the estimate with its unit."""
    return _number(metric, metric.value)


def bound(metric: Metric) -> str:
    """Return the one-sided bound that the margin is held against, or nothing."""
    return "" if metric.bound is None else _relation(metric) + _number(metric, metric.bound)


def interval(metric: Metric) -> str:
    """Return both one-sided 95 % bounds, or the one that the margin is held against, or nothing."""
    if metric.bound is None or metric.opposite_bound is None:
        return bound(metric)
    ends = sorted((metric.bound, metric.opposite_bound))
    low, high = (_number(metric.model_copy(update={"unit": ""}), end) for end in ends)
    return f"{low} to {high} {metric.unit}".rstrip()


def margin(metric: Metric) -> str:
    """Return what the gate allows, or nothing."""
    return "" if metric.margin is None else _relation(metric) + _number(metric, metric.margin)


def is_higher_better(metric: Metric) -> bool:
    """Say whether more of it is better, so that its margin is a lower limit."""
    wording = WORDINGS.get(metric.name)
    return wording is not None and wording.higher_is_better


def rows(metrics: tuple[Metric, ...]) -> list[list[str]]:
    """Return a table's cells: measure, value, bound, margin, verdict."""
    return [[label(m), value(m), bound(m), margin(m), VERDICT_WORDS[m.verdict]] for m in metrics]


def narrow_rows(metrics: tuple[Metric, ...]) -> list[list[str]]:
    """Return the cells of `rows` for a terminal of 80 columns: bound and margin without the unit of the value."""
    bare = [metric.model_copy(update={"unit": ""}) for metric in metrics]
    return [
        [label(m), value(m), bound(b), margin(b), VERDICT_WORDS[m.verdict]] for m, b in zip(metrics, bare, strict=True)
    ]


def reasons(report: Report) -> list[str]:
    """Return a sentence for each measure that did not pass, and what would decide an undecided verdict."""
    sentences = []
    for metric in report.metrics:
        if metric.verdict == "fail":
            sentences.append(f"{label(metric)} is {value(metric)}, the margin {margin(metric)}")
        elif metric.verdict == "undecided":
            sentences.append(
                f"{label(metric)} is {value(metric)}, its bound {bound(metric)}, the margin {margin(metric)}"
            )
    if report.audit:
        sentences += audit_findings(report.audit)
    if report.verdict == "undecided":
        sentences.append(_remedy(report.protocol.text.windows, report.windows_needed))
    return sentences


def _remedy(windows: int, needed: int | None) -> str:
    if needed:
        few = f"fewer than {MINIMUM_WINDOWS} windows cannot pass a variant; " if windows < MINIMUM_WINDOWS else ""
        return f"{few}about {needed} windows instead of {windows} would decide it"
    return "a value lies so close to its margin that more windows of this text would not decide it"


def header(report: Report) -> tuple[str, ...]:
    """Return the titles of the columns of `rows`."""
    return ("measure", "value", f"{100 * report.method.confidence:g} % bound", "margin", "verdict")


def one_line(report: Report, name: str) -> str:
    """Return the verdict and what it rests on in one line, for logs."""
    judged = [metric for metric in report.metrics if metric.verdict != "not judged" and metric.bound is not None]
    measures = [f"{label(m)} {value(m)} ({_signs(m)}{bound(m)[2:]}, margin {margin(m)})" for m in judged]
    failed = [f"{label(m)} {value(m)}" for m in report.metrics if m.verdict == "fail" and m.bound is None]
    windows = f"{report.protocol.text.windows} windows of {report.protocol.text.sequence_length} tokens"
    needed = [f"about {report.windows_needed} would decide"] if report.windows_needed else []
    return "; ".join([f"{VERDICT_WORDS[report.verdict]} {name}", *failed, *measures, windows, *needed])


def _signs(metric: Metric) -> str:
    return "at least " if is_higher_better(metric) else "at most "


AUDIT_HEADER: Final = ("layer", "slope", "expected", "SNR", "worst group")
AUDIT_ROWS: Final = 7
"""Layers that a report shows: those with a problem, then the noisiest."""


def audit_findings(audit: WeightAudit) -> list[str]:
    """Return a sentence for each layer that is damaged and each tensor that is altered; a few stand for many."""
    found = [f"{module.name}: {module.problem}" for module in audit.modules if module.problem]
    found += [f"{name} differs from the base, and the recipe does not name it" for name in audit.altered]
    return found if len(found) <= AUDIT_ROWS else [*found[:AUDIT_ROWS], f"and {len(found) - AUDIT_ROWS} more"]


def audit_rows(audit: WeightAudit) -> list[list[str]]:
    """Return a table's cells for the layers that are worst: name, slope, expected slope, signal-to-noise ratios."""
    worst = sorted(audit.modules, key=lambda module: (module.problem is None, module.snr_db, module.name))
    return [
        [
            module.name,
            f"{module.slope:.4f}",
            f"{module.expected_slope:.4f}",
            f"{module.snr_db:.1f} dB",
            f"{module.worst_group_snr_db:.1f} dB",
        ]
        for module in worst[:AUDIT_ROWS]
    ]


CHANGE_ROWS: Final = ("old", "new", "difference", "95 % from", "95 % to", "noise", "outcome")


def change_label(change: Change) -> str:
    """Return the name for people of a measure of two runs."""
    wording = WORDINGS.get(change.name)
    return wording.label if wording else change.name.replace("_", " ")


def change_header(changes: tuple[Change, ...]) -> list[str]:
    """Return the titles of the columns of `change_rows`."""
    return ["", *map(change_label, changes)]


def change_rows(changes: tuple[Change, ...]) -> list[list[str]]:
    """Return a table's cells, a column for each measure, so that it fits a terminal of 80 columns."""
    columns = [
        [
            *(f"{number:.4f} {change.unit}" for number in (change.old, change.new)),
            *(f"{number:+.4f} {change.unit}" for number in (change.difference, change.lower, change.upper)),
            f"{change.noise:.4f} {change.unit}",
            change.outcome,
        ]
        for change in changes
    ]
    return [list(cells) for cells in zip(CHANGE_ROWS, *columns, strict=True)]


def _relation(metric: Metric) -> str:
    return "≥ " if is_higher_better(metric) else "≤ "


def _number(metric: Metric, number: float) -> str:
    if not math.isfinite(number):
        return "unknown"
    wording = WORDINGS.get(metric.name)
    decimals = wording.decimals if wording else 4
    written = f"{number:.{decimals}f}"
    if number and not float(written):  # a small effect must not read as none
        written = f"{number:.1e}"
    return f"{written} {metric.unit}".rstrip()
