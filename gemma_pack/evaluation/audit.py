"""The weight audit: every quantized layer beside its source, and every other tensor compared with it.

Likelihood is blind to small damage: RMSNorm undoes most of a uniform error in one layer, and what is left drowns in
bf16's own noise. The weights themselves hide nothing, and reading them takes no forward pass: rows of a layer are
read from both checkpoints, a few million weights at a time, so memory does not grow with the model.

With W the source and Ŵ what a server computes with: slope = ⟨W, Ŵ⟩ / ⟨W, W⟩, and the signal-to-noise ratio
10 log10(‖W‖² / ‖W - Ŵ‖²) dB of a layer and of each of its groups. Rounding leaves the ratio where its bits and its
algorithm put it, and takes from the slope what grows with the noise, alike in all layers of one kind, so a layer whose
slope its noise does not explain has wrong scales. `audit_bounds` says how far sound layers go.
"""

from __future__ import annotations

import math
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Final

from gemma_pack.audit_results import ModuleAudit, WeightAudit
from gemma_pack.evaluation.audit_bounds import bounds_for
from gemma_pack.evaluation.quantized_weights import QuantizedWeights, opened
from gemma_pack.evaluation.smoothing_factors import smoothing_factors
from gemma_pack.record import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from gemma_pack.audit_results import AuditBounds
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.quantized_weights import OpenedCheckpoint
    from gemma_pack.evaluation.smoothing_factors import Factors
    from gemma_pack.record import QuantizationRecord

LEAST_POWER: Final = 0.01
"""Of a group, beside the mean of all: GPTQ moves weights of a group that is nearly zero by as much as any others'."""
LINE_LAYERS: Final = 8
SHARE_LAYERS: Final = 3
"""Layers of one kind from which a line, or a share alone, can be read."""
BLOCK_WEIGHTS: Final = 1 << 22
"""Weights that are compared at once: 16 MB in float32."""


def audit_weights(
    base: Checkpoint, variant: Checkpoint, record: QuantizationRecord, *, device: str, reporter: Reporter
) -> WeightAudit | None:
    """Compare every tensor of `variant` with its source in `base`; None for formats that are not compressed-tensors'.

    Raises:
        CheckpointError: config.json does not say how the layers are quantized.
    """
    if variant.config.get("quantization_config", {}).get("quant_method") != "compressed-tensors":
        return None
    with opened(base) as source, opened(variant) as quantized:
        weights = QuantizedWeights(quantized)
        bounds = bounds_for(weights.scheme_name, record.algorithm)
        modules = []
        with reporter.progress("Auditing layers", len(weights.layers)) as task:
            for layer in weights.layers:
                factors = smoothing_factors(layer, source, quantized, weights) if record.smoothing else None
                modules.append(_measure(layer, source, weights, factors, device))
                task.advance()
    shrinkage, modules = _expect(modules)
    return WeightAudit(
        scheme=weights.scheme_name,
        bounds=bounds,
        shrinkage=shrinkage,
        modules=tuple(module.model_copy(update={"problem": problem(module, bounds)}) for module in modules),
        altered=tuple(altered(base, variant, record, reporter)),
    )


def problem(module: ModuleAudit, bounds: AuditBounds) -> str | None:
    """Return what is wrong with a layer, in a few words, or None; a figure that is not finite is wrong, too."""
    if not bounds.slope_min <= module.slope <= bounds.slope_max:
        return f"slope {module.slope:.4f} is not within {bounds.slope_min:g} and {bounds.slope_max:g}"
    if not abs(module.slope - module.expected_slope) <= bounds.slope_deviation:
        return (
            f"slope {module.slope:.4f} is more than {bounds.slope_deviation:g} from {module.expected_slope:.4f}, "
            "which its noise explains"
        )
    if not module.snr_db >= bounds.snr_db:
        return f"signal-to-noise ratio {module.snr_db:.1f} dB is below {bounds.snr_db:g} dB"
    if not module.worst_group_snr_db >= bounds.worst_group_snr_db:
        return (
            f"the group at row {module.worst_row}, column {module.worst_column} has a signal-to-noise ratio of "
            f"{module.worst_group_snr_db:.1f} dB, below {bounds.worst_group_snr_db:g} dB"
        )
    return None


def judge_audit(audit: WeightAudit | None) -> tuple[Metric, ...]:
    """Return the audit's rows of the report's table: how many layers and tensors are not what they must be."""
    if audit is None:
        return ()
    counts = {
        "damaged_layers": sum(module.problem is not None for module in audit.modules),
        "altered_tensors": len(audit.altered),
    }
    return tuple(
        Metric(name=name, value=count, margin=0, verdict="fail" if count else "pass") for name, count in counts.items()
    )


def altered(base: Checkpoint, variant: Checkpoint, record: QuantizationRecord, reporter: Reporter) -> list[str]:
    """Return the names of tensors that no recipe named and that are not byte for byte what they are in the base."""
    kept = sorted(set(base.tensors) - set(record.untouched.changed))
    names = []
    with reporter.progress("Comparing the rest", sum(base.tensors[name].size_bytes for name in kept), "bytes") as task:
        for name in kept:
            source, copy = base.tensors[name], variant.tensors.get(name)
            same = copy and (source.dtype, source.shape) == (copy.dtype, copy.shape)
            if not (copy and same and source.digest() == copy.digest()):
                names.append(name)
            task.advance(source.size_bytes)
    return names


def _measure(
    layer: str, source: OpenedCheckpoint, weights: QuantizedWeights, factors: Factors | None, device: str
) -> ModuleAudit:
    """Compare one layer with its source, block by block; `factors` are what smoothing multiplied it by."""
    import torch

    name = f"{layer}.weight"
    rows, columns = source.checkpoint.tensors[name].shape
    width = weights.group_width(columns)
    step = max(1, BLOCK_WEIGHTS // (columns * weights.block_rows)) * weights.block_rows
    sums = torch.zeros(3, dtype=torch.float64)  # of W Ŵ, W² and (W - Ŵ)²
    worst, place = 0.0, 0
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        original = source.rows(name, begin, end).to(device).float().view(-1, width)
        rounded = weights.rows(layer, begin, end, device)
        if factors:
            rounded = rounded / factors.columns.to(device) / factors.rows[begin:end, None].to(device)
        rounded = rounded.view(-1, width)
        squares, errors = _square(original), _square(original - rounded)
        products = torch.linalg.vecdot(original, rounded)
        sums += torch.stack([part.double().sum().cpu() for part in (products, squares, errors)])
        shares = (errors / squares.clamp(min=LEAST_POWER * float(squares.mean()))).nan_to_num(nan=0.0)
        share, index = shares.max(0)
        if float(share) > worst:
            worst, place = float(share), begin * columns + int(index) * width
    product, square, error = sums.tolist()
    return ModuleAudit(
        name=layer,
        slope=product / square if square else math.nan,
        expected_slope=math.nan,
        snr_db=_decibel(error / square if square else math.inf),
        worst_group_snr_db=_decibel(worst),
        worst_row=place // columns,
        worst_column=place % columns,
    )


def _expect(modules: list[ModuleAudit]) -> tuple[float, list[ModuleAudit]]:
    """Return the share of its noise that a layer's slope loses, and the layers with the slope to expect of each.

    The share is a median over all layers, for the report. What is expected of a layer is read off a line through those
    of its kind, such as all down_proj, whose inputs and so GPTQ's choices are alike.
    """
    kinds: dict[str, list[ModuleAudit]] = {}
    for module in modules:
        kinds.setdefault(module.name.rpartition(".")[2], []).append(module)
    overall = _shrinkage(modules)
    lines = {kind: _line(some, overall) for kind, some in kinds.items()}

    def expected(module: ModuleAudit) -> float:
        begin, rate = lines[module.name.rpartition(".")[2]]
        return begin + rate * _noise(module)

    return overall, [module.model_copy(update={"expected_slope": expected(module)}) for module in modules]


def _line(modules: list[ModuleAudit], overall: float) -> tuple[float, float]:
    """Return slope over noise as a line, its value without noise and its rate.

    By medians (Theil-Sen: Sen, JASA 63, 1968), which a few wrong layers do not move. Too few layers for a line get one
    through 1, by the share that they, or where they are hardly any all layers, lose.
    """
    if len(modules) < LINE_LAYERS:
        return 1.0, -(_shrinkage(modules) if len(modules) >= SHARE_LAYERS else overall)
    points = [(_noise(module), module.slope) for module in modules if math.isfinite(module.slope)]
    rates = [(y - v) / (x - u) for (x, y), (u, v) in combinations(points, 2) if x != u]
    rate = median(rates) if rates else 0.0
    return median(y - rate * x for x, y in points) if points else 1.0, rate


def _shrinkage(modules: list[ModuleAudit]) -> float:
    """Return the median of (1 - slope) ‖W‖² / ‖W - Ŵ‖² over the layers that have noise."""
    shares = [(1 - module.slope) / _noise(module) for module in modules if _noise(module)]
    return median(shares) if shares else 0.0


def _noise(module: ModuleAudit) -> float:
    """Return ‖W - Ŵ‖² / ‖W‖²."""
    return float(10 ** (-module.snr_db / 10))


def _square(rows: Tensor) -> Tensor:
    """Return the sum of squares of each row."""
    import torch

    squares: Tensor = torch.linalg.vecdot(rows, rows)
    return squares


def _decibel(share: float) -> float:
    """Return the signal-to-noise ratio for noise of this share of the signal's power."""
    return -10 * math.log10(share) if share else math.inf
