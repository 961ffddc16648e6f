"""The verdict: is the variant no worse than its base by more than a stated margin, and is the evidence enough?

A test of non-inferiority with three outcomes. A measure passes when the one-sided 95 % bound on its bad side is within
the margin, fails when even the bound on its good side is beyond it, and is undecided between. The gate is an
AND of its measures, which needs no correction for their number; the worst outcome is the gate's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import ValidationError

from gemma_pack.errors import InvalidUsageError
from gemma_pack.evaluation.statistics import CONFIDENCE, Bounds, windows_to_decide
from gemma_pack.record import Metric
from gemma_pack.report import MINIMUM_WINDOWS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gemma_pack.recipe import GateRow
    from gemma_pack.report import Estimate, Verdict


def judge_costs(
    ln_ratio: Estimate, kl: Estimate, same_top1: Estimate, row: GateRow, windows: int
) -> tuple[Metric, Metric, Metric]:
    """Return perplexity increase, mean KL and share of same first choices, held against the row's margins.

    A measure that the row has no margin for is reported with its bound and not judged.
    """
    increase = _scaled(ln_ratio, lambda delta: 100 * math.expm1(min(delta, 700)))
    share = _scaled(same_top1, lambda value: 100 * value)
    return (
        judge(
            Metric(name="ppl_increase_percent", value=increase[0], unit="%"),
            increase,
            row.ppl_increase_percent,
            windows,
        ),
        judge(Metric(name="kl_nats", value=kl.value, unit="nats"), _scaled(kl), row.kl_nats, windows),
        judge(
            Metric(name="same_top1_percent", value=share[0], unit="%"),
            share,
            row.same_top1_percent,
            windows,
            higher_is_better=True,
        ),
    )


def judge(
    metric: Metric,
    bounds: tuple[float, float, float],
    margin: float | None,
    windows: int,
    *,
    higher_is_better: bool = False,
) -> Metric:
    """Return `metric` with its bound, margin and verdict; `bounds` are its value, lower and upper bound.

    Fewer than 32 windows can fail a variant but not pass it: the bootstrap's bounds are too narrow then.
    """
    _, lower, upper = bounds
    bad, good = (lower, upper) if higher_is_better else (upper, lower)
    metric = metric.model_copy(update={"bound": bad, "opposite_bound": good})
    if margin is None:
        return metric

    sign = -1 if higher_is_better else 1
    enough = windows >= MINIMUM_WINDOWS
    # asked so that a bound that is no number passes nothing
    verdict = (
        "fail" if sign * good > sign * margin else "pass" if enough and sign * bad <= sign * margin else "undecided"
    )
    return metric.model_copy(update={"margin": margin, "verdict": verdict})


def overall(metrics: Sequence[Metric]) -> Verdict:
    """Return the worst verdict among the judged metrics."""
    verdicts = {metric.verdict for metric in metrics}
    return "fail" if "fail" in verdicts else "undecided" if "undecided" in verdicts else "pass"


def windows_needed(
    ln_ratio: Estimate,
    kl: Estimate,
    same_top1: Estimate,
    row: GateRow,
    windows: int,
    *,
    confidence: float = CONFIDENCE,
) -> int | None:
    """Return how many windows would likely decide every measure that has a margin.

    None where the value of one lies so close to its margin that no affordable number would.
    """
    margins = (
        (ln_ratio, None if row.ppl_increase_percent is None else math.log1p(row.ppl_increase_percent / 100)),
        (kl, row.kl_nats),
        (same_top1, None if row.same_top1_percent is None else row.same_top1_percent / 100),
    )
    needed = [
        windows_to_decide(Bounds(e.value, e.lower, e.upper, e.standard_error), margin, windows, confidence=confidence)
        for e, margin in margins
        if margin is not None and (windows < MINIMUM_WINDOWS or e.lower <= margin <= e.upper)
    ]
    known = [count for count in needed if count is not None]
    return max(known) if known and len(known) == len(needed) else None


def overridden(row: GateRow, margins: Mapping[str, float]) -> GateRow:
    """Return the row with other margins.

    Raises:
        InvalidUsageError: there is no measure of that name, or no such margin of it.
    """
    known = sorted(name for name in type(row).model_fields if name != "up_to_parameters")
    for name in margins:
        if name not in known:
            raise InvalidUsageError(f"the gate has no measure named {name}", hint=f"it has {', '.join(known)}")
    try:
        return type(row).model_validate({**row.model_dump(), **margins})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidUsageError(
            f"{first['loc'][0]} cannot be {first['input']}: {first['msg']}", hint="give a number that it can be"
        ) from error


def _scaled(estimate: Estimate, scale: Callable[[float], float] = float) -> tuple[float, float, float]:
    """Return value, lower and upper bound in another unit; `scale` is monotone."""
    return scale(estimate.value), scale(estimate.lower), scale(estimate.upper)
