"""What machine a measurement was made on: a figure without it cannot be compared with another."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """Return the name of the processor, and whether it multiplies bf16 matrices by itself."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return name + (" with AMX" if any("amx_bf16" in line for line in lines) else "")


def machine() -> str:
    """Return the processor and how many of its cores there are."""
    return f"{processor()}, {os.cpu_count()} cores"
