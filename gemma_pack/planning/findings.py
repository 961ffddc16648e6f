"""What a plan is held against on this machine: memory, disk, and the GPU that would serve the variant."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gemma_pack.console import format_bytes
from gemma_pack.machine import NATIVE_FROM, available_memory, find_gpus, written

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.quantization.memory import Memory
    from gemma_pack.recipe import Recipe

State = Literal["ok", "limited", "broken"]
"""`limited`: it works, but not as well as it might. `broken`: it will fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFinding:
    """One thing that the plan was held against."""

    subject: str
    state: State
    text: str
    remedy: str | None = None


def memory_finding(memory: Memory) -> PlanFinding:
    """Hold what quantizing takes against what can be had, of a GPU and of the machine."""
    fitting = [
        (gpu, on_gpu)
        for on_gpu in (memory, memory.streamed)
        for gpu in find_gpus()
        if on_gpu and gpu.has_bf16 and (gpu.free_bytes or 0) >= on_gpu.device_bytes
    ]
    needed, where = memory.without_gpu_bytes, ""
    if fitting:
        gpu, on_gpu = fitting[0]
        needed = on_gpu.host_bytes
        where = f", and {format_bytes(on_gpu.device_bytes)} of {gpu.name}" if on_gpu.device_bytes else ""
    available = available_memory()
    text = f"quantizing takes up to {format_bytes(needed)}{where}"
    if available is None:
        return PlanFinding(subject="memory", state="ok", text=f"{text}; this system does not say how much is available")
    text = f"{text}; {format_bytes(available)} are available"
    if available >= needed:
        return PlanFinding(subject="memory", state="ok", text=text)
    return PlanFinding(
        subject="memory",
        state="broken",
        text=text,
        remedy="lower --samples or --sequence-length, take a recipe without calibration (w8a16, fp8-dynamic), or a "
        "larger machine",
    )


def disk_finding(directory: Path, needed: int, image_bytes: int) -> PlanFinding:
    """Hold the bytes that are `needed` against the disk that has, or will have, `directory`."""
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    text = (
        f"base, work and variant take {format_bytes(needed)} here, an OCI layout {format_bytes(image_bytes)} more, "
        f"pushing the directory itself nothing; {format_bytes(free)} are free"
    )
    if free >= needed:
        return PlanFinding(subject="disk", state="ok", text=text)
    remedy = "free some space, or choose a directory on another disk"
    return PlanFinding(subject="disk", state="broken", text=text, remedy=remedy)


def gpu_finding(recipe: Recipe) -> PlanFinding:
    """Hold this machine's GPUs against what the scheme wants; quantizing itself needs none."""
    if recipe.for_bitsandbytes:
        text = "vLLM dropped its loader of bitsandbytes, 0.32 has none: only transformers loads this variant"
        return PlanFinding(subject="GPU", state="limited", text=text, remedy="choose w4a16 or w8a8 to serve it")
    floor = written(NATIVE_FROM[recipe.scheme])
    gpus = find_gpus()
    text = f"serving {recipe.scheme} natively wants compute capability {floor}"
    if not gpus:
        return PlanFinding(
            subject="GPU",
            state="limited",
            text=f"{text}; there is no GPU here",
            remedy=f"serve it on a GPU of {floor} or later; quantizing runs here, on the CPU",
        )
    here = ", ".join(sorted({f"{gpu.name} has {written(gpu.capability)}" for gpu in gpus}))
    if all(gpu.runs_natively(recipe.scheme) for gpu in gpus):
        return PlanFinding(subject="GPU", state="ok", text=f"{text}; {here}")
    return PlanFinding(
        subject="GPU", state="limited", text=f"{text}; {here}", remedy="serve it elsewhere, or choose w4a16 or w8a8"
    )
