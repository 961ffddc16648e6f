"""How a model is loaded for an answer: the presets, the precisions that go with each, and the choice by free memory.

    exact           the weights as they are, or upcast to float32
    speed           the same weights, a static cache and torch.compile
    memory          a variant stays packed as it lies on disk; a bf16 base becomes nf4 or int8 of bitsandbytes
    memory-extreme  one decoder layer at a time is brought in from host memory or disk

local-gemma had presets of these names; its `memory` was fp4, and its numbers were typed. These are measured by
`generate --benchmark`. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from gemma_pack.console import format_bytes
from gemma_pack.errors import InvalidUsageError, MachineError
from gemma_pack.gemma import decoder_linears, decoder_prefix, kv_cache_bytes, require_bfloat16, require_gemma
from gemma_pack.record import read_record

if TYPE_CHECKING:
    from gemma_pack.checkpoint import Checkpoint

Preset = Literal["exact", "speed", "memory", "memory-extreme"]
Precision = Literal["float32", "bfloat16", "int8", "nf4", "packed"]
"""`packed`: the weights stay as a variant holds them, and are unpacked where they are multiplied."""
Device = Literal["cpu", "cuda"]

PRECISIONS: Final[dict[Preset, tuple[Precision, ...]]] = {
    "exact": ("bfloat16", "float32"),
    "speed": ("bfloat16", "float32"),
    "memory": ("nf4", "int8", "packed"),
    "memory-extreme": ("bfloat16",),
}
"""By preset, the default first. bitsandbytes' layers cannot be compiled (transformers, its `is_compileable`)."""
NF4_BITS: Final = 4.127
"""A weight in NF4 with double quantization (QLoRA, arXiv 2305.14314, section 3)."""
ROOM_BYTES: Final = 1_500_000_000
"""What an answer takes beside weights and KV cache: activations of a prompt, float32 logits, the libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What the weights of a checkpoint take by the way they are loaded, in bytes.

    `method` is what its config.json says of its quantization: `compressed-tensors`, `bitsandbytes`, or None.
    `resident_bytes` is what stays when decoder layers are brought in one at a time.
    """

    method: str | None
    bfloat16_bytes: int
    small_bytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to load a model."""

    preset: Preset
    precision: Precision
    device: Device


def measure_weights(checkpoint: Checkpoint) -> Weights:
    """Return what the weights of a base or a variant take, from headers, config and record alone.

    Raises:
        CheckpointError: it is no Gemma that is supported, or float16.
    """
    config = checkpoint.config
    require_gemma(config)
    require_bfloat16(config)
    quantization = config.get("quantization_config")
    size = checkpoint.size_bytes
    if isinstance(quantization, dict):
        record = read_record(checkpoint.directory)
        made = record.quantization if record else None
        whole = (
            made.base_size_bytes if made else 4 * size
        )  # without a record, what int4 of every weight would come from
        method = str(quantization.get("quant_method", "compressed-tensors"))
        return Weights(method=method, bfloat16_bytes=whole, small_bytes=size, resident_bytes=size)
    prefix = decoder_prefix(checkpoint.tensors)
    names = [f"{name}.weight" for layer in decoder_linears(config, prefix) for group in layer for name in group]
    linears = sum(checkpoint.tensors[name].size_bytes for name in names if name in checkpoint.tensors)
    return Weights(
        method=None,
        bfloat16_bytes=size,
        small_bytes=size - linears + round(linears * NF4_BITS / 16),
        resident_bytes=size - linears,
    )


def choose(
    weights: Weights, preset: Preset | None, precision: Precision | None, device: Device, free_bytes: int | None
) -> Plan:
    """Return how to load a model.

    Args:
        weights: of the checkpoint.
        preset: None leaves it to the precision, else to the memory.
        precision: None leaves it to the preset.
        device: where to compute.
        free_bytes: what can still be taken there, beside the KV cache; None where the system does not say.

    Raises:
        InvalidUsageError: preset, precision and checkpoint do not go together.
        MachineError: nothing fits.
    """
    if weights.method == "bitsandbytes" and (preset or "memory") != "memory":
        raise InvalidUsageError(
            f"--preset {preset} wants bf16 weights, and the checkpoint is bitsandbytes' own format",
            hint="use --preset memory, which leaves it as it is, or the bf16 base",
        )
    if weights.method and precision in ("int8", "nf4"):
        raise InvalidUsageError(
            f"--precision {precision} quantizes, and the checkpoint is quantized already",
            hint="leave --precision out, or use the bf16 base",
        )
    if weights.method and preset == "memory-extreme":
        raise InvalidUsageError(
            "--preset memory-extreme brings bf16 layers in one at a time, and the checkpoint is quantized",
            hint="use --preset memory, which keeps it packed, or the bf16 base",
        )
    small: Precision = "packed" if weights.method else "nf4"
    if preset is None and precision:
        preset = "exact" if precision in PRECISIONS["exact"] else "memory"
    if preset is None:
        preset = _fitting(weights, free_bytes, device)
    default = small if preset == "memory" else PRECISIONS[preset][0]
    if precision and precision not in PRECISIONS[preset]:
        raise InvalidUsageError(
            f"--preset {preset} does not compute in {precision}",
            hint=f"it takes --precision {' or '.join(name for name in PRECISIONS[preset] if name != 'packed')}",
        )
    return Plan(preset=preset, precision=precision or default, device=device)


def cache_bytes(checkpoint: Checkpoint, context: int) -> int:
    """Return the bytes of the KV cache of one conversation of `context` tokens, in bf16."""
    return kv_cache_bytes(checkpoint.config, context)


def _fitting(weights: Weights, free_bytes: int | None, device: Device) -> Preset:
    """Return the first of exact, memory and memory-extreme that fits into `free_bytes`."""
    wanted: list[tuple[Preset, int]] = [("exact", weights.bfloat16_bytes), ("memory", weights.small_bytes)]
    if weights.method == "bitsandbytes":
        del wanted[0]
    elif weights.method is None:
        wanted.append(("memory-extreme", weights.resident_bytes))
    for preset, size in wanted:
        if free_bytes is None or size + ROOM_BYTES <= free_bytes:
            return preset
    raise MachineError(
        f"even --preset {wanted[-1][0]} needs {format_bytes(wanted[-1][1] + ROOM_BYTES)}, "
        f"and {device} has {format_bytes(free_bytes or 0)} free",
        hint="close other programs, lower --context, or use a smaller model",
    )
