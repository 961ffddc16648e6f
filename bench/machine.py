"""What machine a measurement was made on: a figure without it cannot be compared with another."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """Return the name of the processor, and by which instructions it multiplies bf16 matrices, if any."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    by = "with AMX" if "amx_bf16" in flags else "with AVX-512 BF16" if "avx512_bf16" in flags else "without bf16"
    return f"{name} {by}"


def machine() -> str:
    """Return the processor and how many of its cores there are."""
    return f"{processor()}, {os.cpu_count()} cores"
