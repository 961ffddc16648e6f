"""What serving a variant with vLLM needs: GPUs and their memory, host memory, CPU, disk on the node.

All of it is computed from config.json and the record, without a GPU at hand. Sizes are bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from gemma_pack.console import format_bytes
from gemma_pack.errors import InvalidUsageError
from gemma_pack.gemma import decoder_number, kv_cache_bytes, layer_number, require_gemma

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

GIB: Final = 1 << 30
GPU_MEMORY_UTILIZATION: Final = 0.9
"""Share of each GPU that vLLM may take. Its default moved between releases (0.9, then 0.92), so it is passed."""
ACTIVATION_BYTES: Final = 3 * GIB
"""Activations, sampling over Gemma's 262,144 logits and CUDA graphs, a GPU: an upper estimate, not a measurement."""
IN_FLIGHT_TOKENS: Final = 2 * 8192
"""Tokens scheduled and not settled: two batches, since vLLM schedules one ahead on a GPU (its
`VllmConfig.max_concurrent_batches`), each as large as it chooses on an H100 (`EngineArgs.get_batch_defaults`)."""
HOST_PROCESS_BYTES: Final = 4 * GIB
"""API server and engine core hold 0.6 GB each (measured, vLLM 0.32); the rest is the worker with its CUDA libraries."""
SHARED_MEMORY_BYTES: Final = 2 * GIB
"""Workers of tensor parallelism exchange tensors in shared memory, of which containers get 64 MB by default."""
LARGEST_SHARD_BYTES: Final = 5_000_000_000
"""What one shard may hold while it is copied to the GPU; transformers splits checkpoints at 5 GB."""
GPU_COUNTS: Final = (1, 2, 4, 8)
GPU_MEMORY_BYTES: Final = 85_000_000_000
"""What A100 and H100 of "80 GB" have: they report 81,920 and 81,559 MiB."""


class Servable(Protocol):
    """What the arithmetic asks of an image."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json of the variant."""

    @property
    def weights_bytes(self) -> int:
        """Tensor bytes of the variant."""

    @property
    def size_bytes(self) -> int:
        """Of all layers, as a node pulls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the user wants served.

    Attributes:
        max_model_len: longest context in tokens; None for the longest that the model knows.
        concurrency: requests of that length whose KV cache must fit at once; shorter ones share the same memory.
        gpu_memory_bytes: memory of one GPU of the cluster at most; the model is split over more GPUs if need be.
    """

    max_model_len: int | None = None
    concurrency: int = 1
    gpu_memory_bytes: int = GPU_MEMORY_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one replica needs. `gpu_memory_bytes` is what each of the `gpus` must have in all."""

    max_model_len: int
    concurrency: int
    gpus: int
    gpu_memory_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    cpu_request: int
    cpu_limit: int
    memory_request_bytes: int
    memory_limit_bytes: int
    shared_memory_bytes: int
    node_disk_bytes: int

    def explain(self) -> str:
        """Return the arithmetic of the GPU memory in a line."""
        shared, where = (f" over {self.gpus}", f"each of {self.gpus} GPUs") if self.gpus > 1 else ("", "one GPU")
        weights, kv_cache = format_bytes(self.weights_bytes), format_bytes(self.kv_cache_bytes)
        return (
            f"GPU memory: (weights {weights} + KV cache {kv_cache} for {self.concurrency} x {self.max_model_len} "
            f"tokens{shared} + {format_bytes(ACTIVATION_BYTES)} for activations) / {GPU_MEMORY_UTILIZATION} "
            f"= {format_bytes(self.gpu_memory_bytes)} on {where}"
        )


def plan_resources(image: Servable, demand: Demand) -> Resources:
    """Return what one replica needs.

    GPU memory is (weights + KV cache, both split over the GPUs, + activations) / share that vLLM may take.
    The request for host memory holds the processes and one shard on its way to the GPU; the limit holds all weights,
    because the page cache they are read through counts too. CPU is a core for the API server, the engine core and the
    worker of each GPU, up to two hyperthreads a core (vLLM, docs/configuration/optimization.md).

    Raises:
        CheckpointError: the image holds no Gemma.
        InvalidUsageError: the context is longer than the model's, or eight GPUs of that size are not enough.
    """
    require_gemma(image.config)
    max_model_len = _context(image.config, demand.max_model_len)
    kv_cache = demand.concurrency * kv_cache_bytes(image.config, max_model_len, in_flight_tokens=IN_FLIGHT_TOKENS)
    gpus, per_gpu = _split(image, kv_cache, demand)
    weights = image.weights_bytes
    host_bytes = HOST_PROCESS_BYTES + SHARED_MEMORY_BYTES
    return Resources(
        max_model_len=max_model_len,
        concurrency=demand.concurrency,
        gpus=gpus,
        gpu_memory_bytes=per_gpu,
        weights_bytes=weights,
        kv_cache_bytes=kv_cache,
        cpu_request=2 + gpus,
        cpu_limit=2 * (2 + gpus),
        memory_request_bytes=host_bytes + math.ceil(1.2 * min(weights, LARGEST_SHARD_BYTES)),
        memory_limit_bytes=host_bytes + math.ceil(1.2 * weights),
        shared_memory_bytes=SHARED_MEMORY_BYTES,
        node_disk_bytes=2 * image.size_bytes,  # the pulled blobs and the unpacked snapshot
    )


def _context(config: Mapping[str, Any], wanted: int | None) -> int:
    longest = decoder_number(config, "max_position_embeddings")
    if wanted is not None and wanted > longest:
        raise InvalidUsageError(
            f"the model has a context of {longest} tokens, not {wanted}", hint=f"--max-model-len {longest} or less"
        )
    return wanted or longest


def _split(image: Servable, kv_cache: int, demand: Demand) -> tuple[int, int]:
    """Return the smallest number of GPUs that is enough, and the bytes that each must have."""
    layers = range(decoder_number(image.config, "num_hidden_layers"))
    kv_heads = min(layer_number(image.config, "num_key_value_heads", layer) for layer in layers)
    needed = 0
    for gpus in filter(lambda count: _divides(image.config, count), GPU_COUNTS):
        share = max(1, kv_heads // gpus) / kv_heads  # vLLM repeats heads rather than cut one
        needed = math.ceil((image.weights_bytes / gpus + kv_cache * share + ACTIVATION_BYTES) / GPU_MEMORY_UTILIZATION)
        if needed <= demand.gpu_memory_bytes:
            return gpus, needed
    raise InvalidUsageError(
        f"each of the most GPUs that this model can be split over needs {format_bytes(needed)}, "
        f"and one has {format_bytes(demand.gpu_memory_bytes)}",
        hint="lower --max-model-len or --concurrency, or name larger GPUs with --gpu-memory",
    )


def _divides(config: Mapping[str, Any], gpus: int) -> bool:
    """Whether tensor parallelism over `gpus` cuts neither a head nor a group of quantized input columns."""
    heads = decoder_number(config, "num_attention_heads")
    group = _group_size(config)
    columns = (decoder_number(config, "intermediate_size"), heads * decoder_number(config, "head_dim"))
    return bool(heads % gpus == 0 and all(width % (gpus * group) == 0 for width in columns))


def _group_size(config: Mapping[str, Any]) -> int:
    """Return the largest group of input columns that share a scale; 1 where there are none."""
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    sizes = [(group.get("weights") or {}).get("group_size") for group in groups.values()]
    return max([size for size in sizes if isinstance(size, int) and size > 0], default=1)
