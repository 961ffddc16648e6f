"""Compares two validations on the same windows: did a new recipe or library make the variant worse?

Both runs scored the same tokens, so window sums are paired as base and variant are within a run. A change counts when
its one-sided 95 % bound is beyond the noise floor of both runs: less than that, bf16 does by itself. So it is with what
the likelihood of the base differs by between the runs, which another machine or version brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from gemma_pack.changes import Change, Changes
from gemma_pack.errors import InvalidUsageError
from gemma_pack.evaluation.statistics import block_bootstrap
from gemma_pack.report import MINIMUM_WINDOWS

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from gemma_pack.report import Base, KernelNoise, NoiseFloor, Report


@dataclass(frozen=True, slots=True)
class _Measure:
    """A measure that two runs are compared by: its column of the window sums, and how it reads."""

    name: str
    column: str
    unit: str
    scale: float = 1.0
    higher_is_better: bool = False


_MEASURES: Final = (
    _Measure("kl_nats", "kl_nats", "nats"),
    _Measure("nll_nats", "nll_variant", "nats"),
    _Measure("same_top1_percent", "same_top1", "%", scale=100, higher_is_better=True),
)


def compare_reports(old: Report, new: Report) -> Changes:
    """Return what changed from `old` to `new`.

    Raises:
        InvalidUsageError: they are not of the same windows, base and engine, or have too few windows.
    """
    _require_pair(old, new)
    changes = tuple(_change(measure, old, new) for measure in _MEASURES)
    return Changes(
        old_sha256=old.digest(),
        new_sha256=new.digest(),
        windows=len(new.windows),
        regressed=any(change.outcome == "regressed" for change in changes),
        changes=changes,
    )


def _require_pair(old: Report, new: Report) -> None:
    same_text = old.protocol.text.sha256 == new.protocol.text.sha256
    if not same_text or len(old.windows) != len(new.windows):
        raise InvalidUsageError(
            "the two reports read different windows, so they cannot be paired",
            hint="validate both with the same --text, --profile and --seed",
        )
    if not _same_base(old.base, new.base):
        names = [" ".join(filter(None, (base.model_id, base.revision))) for base in (old.base, new.base)]
        said = " and ".join(names) if names[0] != names[1] else f"two that are both called {names[0]}"
        raise InvalidUsageError(f"the two reports have different bases: {said}", hint="compare variants of one base")
    if old.engine.name != new.engine.name:
        raise InvalidUsageError(
            f"one report comes from {old.engine.name}, the other from {new.engine.name}, which differ by themselves",
            hint="validate both with the same --engine",
        )
    if len(old.windows) < MINIMUM_WINDOWS:
        raise InvalidUsageError(
            f"{len(old.windows)} windows are too few to show a change", hint="validate both with --profile quick"
        )


def _same_base(old: Base, new: Base) -> bool:
    """Tell whether two reports are about one base: by its weights, or by commit, name and size where those say more."""
    digests = {old.weights_sha256, new.weights_sha256}
    if None not in digests and (len(digests) == 1 or new.revision is None):
        return len(digests) == 1
    names = [(base.model_id, base.revision, base.parameters, base.size_bytes) for base in (old, new)]
    return names[0] == names[1]


def _change(measure: _Measure, old: Report, new: Report) -> Change:
    before, after = (measure.scale * _sums(report, measure.column) for report in (old, new))
    tokens = _sums(new, "tokens")
    noise = max(_noise(measure, report.noise_floor) for report in (old, new))
    if measure.column == "nll_variant":  # another machine or version moves the base as it moves the variant
        noise = max(noise, abs(float((_sums(new, "nll_base") - _sums(old, "nll_base")).sum() / tokens.sum())))
    bounds = block_bootstrap(after - before, tokens, seed=new.method.seed)
    up, down = bounds.lower > noise, bounds.upper < -noise
    worse, better = (down, up) if measure.higher_is_better else (up, down)
    return Change(
        name=measure.name,
        old=float(before.sum() / tokens.sum()),
        new=float(after.sum() / tokens.sum()),
        difference=bounds.value,
        lower=bounds.lower,
        upper=bounds.upper,
        noise=noise,
        outcome="regressed" if worse else "improved" if better else "no change shown",
        unit=measure.unit,
    )


def _sums(report: Report, column: str) -> npt.NDArray[np.float64]:
    return np.array([float(getattr(window, column)) for window in report.windows])


def _noise(measure: _Measure, floor: NoiseFloor) -> float:
    """Return what another batch size or attention kernel alone moved the measure by."""
    rows: list[NoiseFloor | KernelNoise] = [floor, *([floor.kernel] if floor.kernel else [])]
    noise: Callable[[NoiseFloor | KernelNoise], float] = {
        "kl_nats": lambda row: row.kl_nats,
        "nll_nats": lambda row: abs(row.ln_ratio),
        "same_top1_percent": lambda row: 100 * (1 - row.same_top1),
    }[measure.name]
    return max(map(noise, rows))
