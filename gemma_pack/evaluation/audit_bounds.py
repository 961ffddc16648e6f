"""What sound rounding leaves of a layer, by scheme and algorithm.

Measured on all 126 layers of Gemma 3 270M (`bench/audit.py`, bench/results/audit-bounds.json), with room for other
models: 3 to 6 dB on the noise, because how far weights spread within a group differs from model to model; on the slope,
so little that 3 % stand out in every layer. GPTQ moves weights to make up for the rounding of others, the more
the finer the steps and the fewer the calibration tokens, so its bounds are its own.
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
    "W8A16": _bounds((0.985, 1.015), 0.01, 36, 25),  # 0.9994 to 1.0006, 0.0011, 40.4 dB, 31.4 dB
    "W8A8": _bounds((0.985, 1.015), 0.01, 33, 18),  # 0.9998 to 1.0001, 0.0001, 37.9 dB, 24.5 dB
    "FP8_DYNAMIC": _bounds((0.985, 1.015), 0.01, 28, 25),  # 0.9985 to 0.99997, 0.0006, 31.5 dB, 29.7 dB
    "FP8_BLOCK": _bounds((0.985, 1.015), 0.01, 28, 20),  # 0.998 to 0.9998, 0.0011, 31.5 dB, 25.8 dB
    "FP8": _bounds((0.985, 1.015), 0.01, 26, 10),
    "NVFP4": _bounds((0.955, 1.01), 0.015, 14, 2),
}
_GPTQ: Final = {  # measured with 4096 tokens of calibration text, the fewest that make sense
    "W4A16": _bounds((0.955, 1.01), 0.018, 8, -6),  # 0.979 to 0.991, 0.0085, 12.3 dB, -1.6 dB; refined alike
    "W8A8": _bounds((0.985, 1.015), 0.01, 18, -6),  # 0.9998 to 1.0003, 0.0002, 21.6 dB, 1.7 dB
    "FP8": _bounds((0.985, 1.015), 0.01, 22, 8),  # 0.9977 to 1.0008, 0.0017, 26.5 dB, 11.5 dB
    "NVFP4": _bounds((0.955, 1.01), 0.018, 11, -7),  # 0.980 to 0.986, 0.0033, 15.5 dB, -2.2 dB
}
"""No recipe that is shipped uses GPTQ with another scheme; the file of a user that does gets the bounds of W8A8."""


def bounds_for(scheme: str, algorithm: str) -> AuditBounds:
    """Return the bounds for a scheme, as recipes name it, and a record's algorithm."""
    return _NEAREST[scheme] if algorithm == "nearest" else _GPTQ.get(scheme, _GPTQ["W8A8"])
