"""What sound rounding leaves of a layer, by scheme and algorithm.

Measured on all 126 layers of Gemma 3 270M, with room for other models: 3 to 6 dB on the noise, because how far weights
spread within a group differs from model to model; on the slope, at most two thirds of the 3 % that must be found.
"""

from __future__ import annotations

from typing import Final

from gemma_pack.audit_results import AuditBounds


def _bounds(slope: tuple[float, float], deviation: float, snr_db: float, worst_group_snr_db: float) -> AuditBounds:
    return AuditBounds(
        slope_min=slope[0],
        slope_max=slope[1],
        slope_deviation=deviation,
        snr_db=snr_db,
        worst_group_snr_db=worst_group_snr_db,
    )


_NEAREST: Final = {  # measured: slopes, how far one is from what is expected of it, lowest SNR of a layer, of a group
    "W4A16": _bounds((0.955, 1.01), 0.015, 11, 4),  # 0.978 to 0.999, 0.0063, 14.3 dB, 7.9 dB
    "W8A16": _bounds((0.985, 1.015), 0.01, 36, 25),  # 0.9994 to 1.0004, 0.0009, 40.5 dB, 31.4 dB
    "W8A8": _bounds((0.985, 1.015), 0.01, 33, 18),  # 0.9998 to 1.0001, 0.0001, 37.9 dB, 24.5 dB
    "FP8_DYNAMIC": _bounds((0.985, 1.015), 0.01, 28, 25),  # 0.9985 to 0.9994, 0.0006, 31.7 dB, 30.6 dB
    "FP8_BLOCK": _bounds((0.985, 1.015), 0.01, 28, 20),  # 0.9987 to 0.9997, 0.0005, 31.6 dB, 25.8 dB
    "FP8": _bounds((0.985, 1.015), 0.01, 26, 10),
    "NVFP4": _bounds((0.955, 1.01), 0.015, 14, 2),
}
_MADE_UP_SNR_DB: Final = 3.0
_MADE_UP_GROUP_SNR_DB: Final = 9.0
_MADE_UP_DEVIATION: Final = 0.018
"""GPTQ moves weights to make up for the rounding of others, so each is further from its source. With W4A16 layers lie
2.8 dB lower (12.3 dB), the worst group 9 dB (-0.7 dB), and slopes within 0.0112 of what is expected of them."""


def bounds_for(scheme: str, algorithm: str) -> AuditBounds:
    """Return the bounds for a scheme, as recipes name it, and a record's algorithm."""
    bounds = _NEAREST[scheme]
    if algorithm == "nearest":
        return bounds
    return _bounds(
        (bounds.slope_min, bounds.slope_max),
        max(bounds.slope_deviation, _MADE_UP_DEVIATION),
        bounds.snr_db - _MADE_UP_SNR_DB,
        bounds.worst_group_snr_db - _MADE_UP_GROUP_SNR_DB,
    )
