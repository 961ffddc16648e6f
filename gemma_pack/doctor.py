"""What this machine can do for gemma-pack, what it lacks, and the remedy.

Nothing is changed, nothing is asked of a network, no secret is shown. Versions are read from metadata, so that a
machine without torch gets the same answer.
"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from gemma_pack.console import format_bytes
from gemma_pack.errors import AccessError, MachineError
from gemma_pack.machine import NATIVE_FROM, Gpu, available_memory, find_gpus, written
from gemma_pack.vllm import find_vllm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from packaging.requirements import Requirement

State = Literal["ok", "limited", "broken"]
"""`limited`: some commands cannot run or are slow. `broken`: gemma-pack itself is not as it must be."""

FOR_MODELS: Final = frozenset(
    {"torch", "transformers", "llmcompressor", "compressed-tensors", "bitsandbytes", "datasets"}
)
"""Packages that only quantize and validate need."""
TOOLS: Final = {
    "podman": "deploy --target rhaiis",
    "skopeo": "deploy --target rhelai, and a second opinion on images",
    "kubectl": "deploy --target kserve",
}
VLLM_SERVES: Final = "serve, deploy --target vllm and validate --engine vllm"
BF16_BYTES: Final = 2
DEMO_DISK_BYTES: Final = 2_000_000_000
"""The demo's base, variant and image take 1.2 GB, and 0.3 GB more while the base is made."""
OLDEST_DRIVER: Final = 525
"""Runs what is built for CUDA 12 (CUDA compatibility guide, minor version compatibility)."""
CUDA_13_DRIVER: Final = 580
"""Runs what is built for CUDA 13 (the same guide)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    state: State
    text: str
    remedy: str | None = None


def examine(
    directory: Path, registries: Sequence[str] | AccessError, environ: Mapping[str, str] = os.environ
) -> list[Finding]:
    """Look at this machine.

    Args:
        directory: where the work would be done.
        registries: hosts with a stored login, or what is wrong with the file of logins.
        environ: the environment variables.
    """
    gpus = find_gpus()
    return [
        Finding(subject="Python", state="ok", text=platform.python_version()),
        *_packages(),
        *_gpus(gpus),
        *_driver(gpus),
        *_recipes(gpus),
        *_torch_build(has_gpu=any(gpu.has_bf16 for gpu in gpus)),
        _processor(),
        _memory(),
        _disk(directory),
        _hub(environ),
        _registries(registries),
        *_tools(),
        _vllm(environ),
    ]


def _packages() -> list[Finding]:
    """Compare what is installed with what gemma-pack's own metadata asks for."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in metadata.requires("gemma-pack") or ()]
    except metadata.PackageNotFoundError:
        text = "gemma-pack runs from a tree that is not installed"
        return [Finding(subject="packages", state="broken", text=text, remedy="pip install -e .")]
    findings, fine = [], []
    for requirement in asked:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed and requirement.specifier.contains(installed, prereleases=True):
            fine.append(f"{requirement.name} {installed}" if requirement.name in FOR_MODELS else "")
        else:
            findings.append(_package(requirement, installed))
    named = ", ".join(name for name in fine if name)
    summary = f"{len(fine)} as required" + (f": {named}" if named else "")
    return [Finding(subject="packages", state="ok", text=summary), *findings]


def _package(requirement: Requirement, installed: str | None) -> Finding:
    only_for_models = requirement.name in FOR_MODELS
    return Finding(
        subject=requirement.name,
        state="limited" if only_for_models and installed is None else "broken",
        text=(f"{installed} is installed" if installed else "is not installed")
        + f", {requirement.specifier or 'any version'} is required"
        + (" to quantize and validate" if only_for_models else ""),
        remedy=f"pip install '{requirement.name}{requirement.specifier}'",
    )


def _gpus(found: Sequence[Gpu]) -> list[Finding]:
    if not found:
        return [
            Finding(
                subject="GPU",
                state="limited",
                text="none found: quantize and validate run on the CPU, slowly; vLLM's servers want a GPU",
                remedy="install NVIDIA's driver where there is a GPU; nvidia-smi comes with it",
            )
        ]
    return [_gpu(f"GPU {number}", gpu) for number, gpu in enumerate(found)]


def _gpu(subject: str, gpu: Gpu) -> Finding:
    free, total = ("?" if size is None else format_bytes(size) for size in (gpu.free_bytes, gpu.total_bytes))
    text = f"{gpu.name}, {free} of {total} free, compute capability {written(gpu.capability)}, driver {gpu.driver}"
    if gpu.has_bf16:
        return Finding(subject=subject, state="ok", text=text)
    return Finding(
        subject=subject,
        state="limited",
        text=f"{text}: no bfloat16, and Gemma overflows float16",
        remedy="use Ampere (A10, A100), Ada (L4, L40S) or later",
    )


def _driver(gpus: Sequence[Gpu]) -> list[Finding]:
    """Hold the driver against the CUDA that torch's builds bring with them."""
    versions = sorted({gpu.driver for gpu in gpus})
    majors = [int(version.partition(".")[0]) for version in versions if version.partition(".")[0].isdigit()]
    if not majors:
        return []
    text = ", ".join(versions)
    if min(majors) >= CUDA_13_DRIVER:
        return [Finding(subject="driver", state="ok", text=f"{text}: CUDA 13 and older")]
    if min(majors) >= OLDEST_DRIVER:
        remedy = f"update the driver to {CUDA_13_DRIVER} or later, or install torch's build for CUDA 12"
        return [Finding(subject="driver", state="limited", text=f"{text}: CUDA 12, not 13", remedy=remedy)]
    remedy = f"update the driver to {CUDA_13_DRIVER} or later"
    return [Finding(subject="driver", state="limited", text=f"{text}: too old for CUDA 12", remedy=remedy)]


def _recipes(gpus: Sequence[Gpu]) -> list[Finding]:
    """Hold the GPUs against what each shipped recipe needs to be served; vLLM does not load those of bitsandbytes."""
    from gemma_pack.recipe import load_recipe, shipped_names

    recipes = {name: load_recipe(name) for name in shipped_names()}
    schemes = {name: recipe.scheme for name, recipe in recipes.items() if not recipe.for_bitsandbytes}
    if not gpus:
        return [Finding(subject="recipes", state="ok", text=_floors(schemes))]
    fine = [name for name, scheme in schemes.items() if all(gpu.runs_natively(scheme) for gpu in gpus)]
    findings = [Finding(subject="recipes", state="ok", text=f"served natively here: {', '.join(fine) or 'none'}")]
    for name in (name for name in schemes if name not in fine):
        unpacked = all(gpu.has_bf16 for gpu in gpus)
        if not all(gpu.serves(schemes[name]) for gpu in gpus):
            text = "vLLM has no int8 kernel for compute capability 10.0 and later: its server ends with an error"
            remedy = "choose fp8-dynamic or w4a16 here"
            findings.append(Finding(subject=f"recipe {name}", state="limited", text=text, remedy=remedy))
            continue
        text = f"wants compute capability {written(NATIVE_FROM[schemes[name]])}" + (
            "; here vLLM unpacks its weights to bfloat16, which saves memory and no time" if unpacked else ""
        )
        remedy = "serve it on a newer GPU, or choose w4a16 or w8a8" if unpacked else "serve it on Ampere or later"
        findings.append(Finding(subject=f"recipe {name}", state="limited", text=text, remedy=remedy))
    return findings


def _floors(schemes: Mapping[str, str]) -> str:
    """Say which compute capability serves which recipes natively; `schemes` are theirs by name."""
    names: dict[tuple[int, int], list[str]] = {}
    for name, scheme in schemes.items():
        names.setdefault(NATIVE_FROM[scheme], []).append(name)
    floors = (f"{written(floor)} for {', '.join(names[floor])}" for floor in sorted(names))
    return f"compute capability that serves them natively: {'; '.join(floors)}"


def _torch_build(*, has_gpu: bool) -> list[Finding]:
    installed = _version("torch")
    if not (has_gpu and installed and installed.endswith("+cpu")):
        return []
    remedy = f"pip install --force-reinstall torch=={installed.removesuffix('+cpu')}"
    return [Finding(subject="torch", state="limited", text=f"{installed} leaves the GPU unused", remedy=remedy)]


def _processor() -> Finding:
    """Count what this process may use, and look for the instructions that make bfloat16 fast."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{cores} cores, {platform.machine()}"
    try:
        flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    except OSError:
        return Finding(subject="CPU", state="ok", text=text)
    fast = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    return Finding(subject="CPU", state="ok", text=f"{text}, " + (", ".join(fast) if fast else "no bf16 instructions"))


def _memory() -> Finding:
    available = available_memory()
    if available is None:
        return Finding(subject="memory", state="ok", text="this system does not say how much is available")
    billions = available / BF16_BYTES / 1e9
    text = f"{format_bytes(available)} available: bf16 weights of up to {billions:.1f} billion parameters"
    return Finding(subject="memory", state="ok", text=text)


def _disk(directory: Path) -> Finding:
    free = shutil.disk_usage(directory).free
    parameters = free / (3 * BF16_BYTES)
    text = f"{format_bytes(free)} free here: base, variant and image of up to {parameters / 1e9:.1f} billion parameters"
    if free >= DEMO_DISK_BYTES:
        return Finding(subject="disk", state="ok", text=text)
    return Finding(
        subject="disk",
        state="limited",
        text=f"{text}; the demo takes {format_bytes(DEMO_DISK_BYTES)}",
        remedy="free some space, or work in another directory",
    )


def _hub(environ: Mapping[str, str]) -> Finding:
    from huggingface_hub import get_token

    if environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        text, remedy = "HF_HUB_OFFLINE keeps us away from it", "unset HF_HUB_OFFLINE"
        return Finding(subject="model hub", state="limited", text=text, remedy=remedy)
    if get_token():
        return Finding(subject="model hub", state="ok", text="a token is stored")
    return Finding(
        subject="model hub",
        state="limited",
        text="no token: Gemma is gated, and only the demo model comes without one",
        remedy="accept the licence on the model's page, such as https://huggingface.co/google/gemma-2-9b-it, "
        "then run: hf auth login",
    )


def _registries(hosts: Sequence[str] | AccessError) -> Finding:
    if isinstance(hosts, AccessError):
        return Finding(subject="registries", state="limited", text=hosts.message, remedy=hosts.hint)
    if hosts:
        return Finding(subject="registries", state="ok", text=f"logins for {', '.join(hosts)}")
    return Finding(
        subject="registries",
        state="limited",
        text="no login is stored: push works only where everyone may",
        remedy="podman login HOST, or docker login HOST",
    )


def _tools() -> list[Finding]:
    findings = []
    for name, purpose in TOOLS.items():
        if shutil.which(name):
            findings.append(Finding(subject=name, state="ok", text=f"there, for {purpose}"))
        else:
            remedy = f"install {name} with the system's package manager"
            findings.append(Finding(subject=name, state="limited", text=f"missing, for {purpose}", remedy=remedy))
    return findings


def _vllm(environ: Mapping[str, str]) -> Finding:
    try:
        found = find_vllm(environ)
    except MachineError as error:  # what serve would say
        return Finding(subject="vLLM", state="limited", text=f"{error.message}, for {VLLM_SERVES}", remedy=error.hint)
    return Finding(subject="vLLM", state="ok", text=f"there, for {VLLM_SERVES}: {found}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
