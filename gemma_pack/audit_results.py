"""What the weight audit found, layer by layer: a part of report.json that evaluation fills and reports render."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class AuditBounds(_Part):
    """What sound rounding leaves of a layer: outside of these it was damaged."""

    slope_min: float
    slope_max: float
    slope_deviation: float
    """How far a layer's slope may be from what is expected of it."""
    snr_db: float
    worst_group_snr_db: float


class ModuleAudit(_Part):
    """One quantized layer (Ŵ) beside its source (W)."""

    name: str
    slope: float
    """⟨W, Ŵ⟩ / ⟨W, W⟩."""
    expected_slope: float
    """1 - c ‖W - Ŵ‖² / ‖W‖²: noise takes a little of the slope, in all layers of a kind the same share c of it."""
    snr_db: float
    """10 log10(‖W‖² / ‖W - Ŵ‖²)."""
    worst_group_snr_db: float
    """The same of the group of weights with the largest error for its size, and where in the matrix it begins."""
    worst_row: int
    worst_column: int
    problem: str | None = None


class WeightAudit(_Part):
    """Every tensor beside its source, without a forward pass."""

    scheme: str
    bounds: AuditBounds
    shrinkage: float
    """c: the median over all layers of (1 - slope) ‖W‖² / ‖W - Ŵ‖²."""
    modules: tuple[ModuleAudit, ...]
    altered: tuple[str, ...] = ()
    """Tensors that no recipe named and that differ from the source."""
