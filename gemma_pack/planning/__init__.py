"""What a variant will be and take, before any weight is read: sizes, memory, disk, layers, what a registry lacks.

Everything follows from headers and the recipe: the shapes of the tensors that replace each linear layer, the shards
they are divided into, the layers of the image. What is certain is exact; memory is an upper estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_pack.deploy.resources import Demand, plan_resources
from gemma_pack.gemma import decoder_number, kv_cache_bytes
from gemma_pack.oci.base import DEFAULT_BASE, load_base
from gemma_pack.oci.layers import MODELS_DIRECTORY, LayerEntry, arrange_layers
from gemma_pack.planning.findings import PlanFinding, disk_finding, gpu_finding, memory_finding
from gemma_pack.planning.registry import PlannedLayer, ask_registry
from gemma_pack.planning.sizes import plan_sizes
from gemma_pack.quantization.memory import peak_memory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from gemma_pack.recipe import Calibration, Recipe
    from gemma_pack.sources.outline import Outline


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All of it. Sizes in bytes."""

    model_id: str
    revision: str | None
    recipe: str
    scheme: str
    parameters: int
    base_bytes: int
    variant_bytes: int
    fetch_bytes: int
    memory_bytes: int
    """Of the process where the CPU does all."""
    gpu_memory_bytes: int
    """That quantizing takes of a GPU where there is one; the rest stays in the process."""
    disk_bytes: int
    layers: tuple[PlannedLayer, ...]
    image_bytes: int
    missing_bytes: int | None
    node_disk_bytes: int
    max_model_len: int
    kv_cache_bytes: int
    """Of one request of `max_model_len` tokens."""
    serving_gpu_bytes: int
    findings: tuple[PlanFinding, ...]


def make_plan(
    found: Outline,
    recipe: Recipe,
    calibration: Calibration | None,
    *,
    directory: Path,
    push: str | None = None,
    plain_http: bool = False,
    ca_file: Path | None = None,
) -> Plan:
    """Return the plan of a variant of the model `found` by `recipe`.

    Args:
        found: the model by its headers.
        recipe: what is to be done with it.
        calibration: the recipe's, or what the user said instead; None for a recipe that needs no text.
        directory: where the variant would be made, whose disk counts.
        push: a reference to push to; its registry is asked what it has.
        plain_http: speak HTTP without TLS to that registry.
        ca_file: certificates to trust besides the system's.

    Raises:
        RecipeError, CheckpointError: as `plan_sizes`.
        RegistryError, AccessError, OfflineError: the registry.
    """
    checkpoint = found.checkpoint
    sizes = plan_sizes(checkpoint, recipe, found.companions)
    entries = [
        LayerEntry(name=f"{MODELS_DIRECTORY}/{name}", source=Path(name), size_bytes=size)
        for name, size in sorted(sizes.files.items())
    ]
    layers = arrange_layers(entries)
    bases = load_base(DEFAULT_BASE)
    base_blobs = {blob.descriptor.digest: blob.size_bytes for base in bases for blob in base.layers}
    image_bytes = sum(layer.size_bytes for layer in layers) + sum(base_blobs.values())
    planned = tuple(PlannedLayer(title=layer.title, size_bytes=layer.size_bytes) for layer in layers)
    missing = None
    registry: tuple[PlanFinding, ...] = ()
    if push:
        asked = ask_registry(push, found, sizes, planned, base_blobs, plain_http=plain_http, ca_file=ca_file)
        planned, missing, registry = asked.layers, asked.missing_bytes, asked.findings
    served = _Served(config=checkpoint.config, weights_bytes=sizes.variant_bytes, size_bytes=image_bytes)
    resources = plan_resources(served, Demand())
    memory = peak_memory(checkpoint, recipe, calibration)
    journal = sizes.quantized_bytes if recipe.needs_calibration else 0  # else the shards grow where they stay
    disk = found.fetch_bytes + sizes.variant_bytes + journal
    longest = decoder_number(checkpoint.config, "max_position_embeddings")
    return Plan(
        model_id=found.model_id,
        revision=found.revision,
        recipe=recipe.name,
        scheme=recipe.scheme,
        parameters=sum(info.parameters for info in checkpoint.tensors.values()),
        base_bytes=sizes.base_bytes,
        variant_bytes=sizes.variant_bytes,
        fetch_bytes=found.fetch_bytes,
        memory_bytes=memory.without_gpu_bytes,
        gpu_memory_bytes=memory.device_bytes,
        disk_bytes=disk,
        layers=planned,
        image_bytes=image_bytes,
        missing_bytes=missing,
        node_disk_bytes=resources.node_disk_bytes,
        max_model_len=longest,
        kv_cache_bytes=kv_cache_bytes(checkpoint.config, longest),
        serving_gpu_bytes=resources.gpu_memory_bytes,
        findings=(memory_finding(memory), disk_finding(directory, disk, image_bytes), gpu_finding(recipe), *registry),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """What `plan_resources` asks of an image, before there is one."""

    config: Mapping[str, Any]
    weights_bytes: int
    size_bytes: int
