"""What this machine has: GPUs by the driver's own tool, memory that can still be taken; and what each scheme wants.

The GPU is asked through nvidia-smi, so that a machine without torch gets the same answer.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

OLDEST_BF16_GPU: Final = (8, 0)
"""Compute capability of Ampere, NVIDIA's first with bfloat16 (CUDA C++ programming guide, arithmetic instructions)."""
NATIVE_FROM: Final[dict[str, tuple[int, int]]] = {
    "W4A16": (8, 0), "W8A16": (8, 0), "W8A8": (8, 0), "FP8": (8, 9), "FP8_DYNAMIC": (8, 9), "FP8_BLOCK": (9, 0),
    "NVFP4": (10, 0), "BNB_INT8": (8, 0), "BNB_NF4": (8, 0),
}  # fmt: skip
"""Compute capability from which a GPU multiplies in the scheme's own numbers. Below it, and from OLDEST_BF16_GPU on,
vLLM 0.32 still loads FP8 and NVFP4 and unpacks the weights to bfloat16 (`get_min_capability` of its compressed-tensors
schemes: 75 for all, 89 for FP8 activations); int8 and int4 need less than bfloat16 does."""
NO_KERNEL_FROM: Final[dict[str, tuple[int, int]]] = {"W8A8": (10, 0)}
"""Compute capability from which vLLM, 0.32 too, ends with `Int8 not supported on SM100`: its CutlassInt8ScaledMM-
LinearKernel claims every GPU and has no kernel for Blackwell (vllm#54311)."""
ANSWER_SECONDS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. What the driver does not say, as with a part of a split one, is None."""

    name: str
    total_bytes: int | None
    free_bytes: int | None
    driver: str
    capability: tuple[int, int] | None

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16, without which no Gemma runs right."""
        return self.capability is not None and self.capability >= OLDEST_BF16_GPU

    def runs_natively(self, scheme: str) -> bool:
        """Whether it multiplies in the numbers of the scheme, a recipe's `scheme`."""
        return self.capability is not None and self.capability >= NATIVE_FROM[scheme] and self.serves(scheme)

    def serves(self, scheme: str) -> bool:
        """Whether vLLM has a kernel for the scheme here."""
        return self.capability is None or self.capability < NO_KERNEL_FROM.get(scheme, (99, 0))


def find_gpus() -> list[Gpu]:
    """Return the GPUs that the driver lists; none where there is no driver or it does not answer."""
    fields = "name,memory.total,memory.free,driver_version,compute_cap"
    output = _answer(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    lines = [[cell.strip() for cell in line.split(",")] for line in (output or "").splitlines() if line.count(",") == 4]
    return [_gpu(line) for line in lines]


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be taken: of the machine, and of the container's limit if there is one."""
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text("utf-8").splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text("utf-8"))
        used = int((group / "memory.current").read_text("utf-8")) - _file_cache(group)
        return max(0, min(available, limit - used))
    except (OSError, ValueError):  # no control group, or `max`: no limit
        return available


def _file_cache(group: Path) -> int:
    """Return the bytes of files that a control group holds and gives back when asked, as MemAvailable counts them."""
    try:
        lines = dict(line.split() for line in (group / "memory.stat").read_text("utf-8").splitlines())
        return int(lines["inactive_file"]) + int(lines["active_file"])
    except (OSError, KeyError, ValueError):
        return 0


def written(capability: tuple[int, int] | None) -> str:
    """Write a compute capability as NVIDIA does."""
    return "?" if capability is None else f"{capability[0]}.{capability[1]}"


def _gpu(line: list[str]) -> Gpu:
    name, total_mib, free_mib, driver, capability = line
    total, free = (int(size) << 20 if size.isdigit() else None for size in (total_mib, free_mib))
    major, _, minor = capability.partition(".")
    known = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    return Gpu(name=name, total_bytes=total, free_bytes=free, driver=driver, capability=known)


def _answer(command: list[str]) -> str | None:
    """Return what a program prints; None where there is none, or it fails or hangs."""
    try:
        return subprocess.run(  # noqa: S603 - a fixed list
            command, check=True, capture_output=True, text=True, timeout=ANSWER_SECONDS
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
