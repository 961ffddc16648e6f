"""What a replica needs: formulas against figures worked out by hand, and what must always hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.deploy.resources import ACTIVATION_BYTES, GIB, Demand, plan_resources
from gemma_pack.errors import CheckpointError, InvalidUsageError
from tests.deploy.conftest import CONFIGS, GROUPS_OF_128

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma_pack.deploy.image import ServedImage


def test_kv_cache_of_gemma_3_27b_at_its_full_context(served: Callable[..., ServedImage]) -> None:
    # 2 (K and V) x 16 heads x 128 x 2 bytes = 8192 bytes a token and layer; every sixth of 62 layers is global
    # vLLM serves layers in groups of one size, here ten, and pads the 52 sliding ones to 60
    per_layer, global_layers, sliding_layers = 8192, 10, 60
    expected = per_layer * (global_layers * 131072 + sliding_layers * (1024 + 2 * 8192))
    assert plan_resources(served("gemma-3-27b-it"), Demand()).kv_cache_bytes == expected


def test_kv_cache_of_gemma_2_9b_alternates(served: Callable[..., ServedImage]) -> None:
    # 2 x 8 x 256 x 2 = 8192 bytes; 21 of 42 layers are global, and window and prefill cover the 8192 tokens of the rest
    resources = plan_resources(served("gemma-2-9b-it"), Demand(concurrency=3))
    assert resources.kv_cache_bytes == 3 * 8192 * 42 * 8192


def test_gpu_memory_is_the_sum_over_the_share_that_vllm_may_take(served: Callable[..., ServedImage]) -> None:
    image = served("gemma-2-9b-it")
    resources = plan_resources(image, Demand())
    used = image.weights_bytes + resources.kv_cache_bytes + ACTIVATION_BYTES
    assert resources.gpus == 1
    assert used / 0.9 <= resources.gpu_memory_bytes < used / 0.9 + 1


def test_a_model_that_does_not_fit_one_gpu_is_split(served: Callable[..., ServedImage]) -> None:
    whole = plan_resources(served("gemma-3-27b-it"), Demand(gpu_memory_bytes=96_000_000_000))
    split = plan_resources(served("gemma-3-27b-it"), Demand(gpu_memory_bytes=48_000_000_000))
    assert (whole.gpus, split.gpus) == (1, 2)
    assert split.gpu_memory_bytes < whole.gpu_memory_bytes
    assert (split.cpu_request, split.cpu_limit) == (4, 8)
    assert "over 2" in split.explain()


def test_heads_and_groups_are_never_cut(served: Callable[..., ServedImage]) -> None:
    # the 270M has 4 heads, and 8 x 128 columns do not fit its 4 x 256 attention columns eight times over
    with pytest.raises(InvalidUsageError, match="needs") as caught:
        plan_resources(served(), Demand(gpu_memory_bytes=2_000_000_000))
    assert caught.value.hint is not None
    assert "--gpu-memory" in caught.value.hint
    odd = {**CONFIGS["gemma-2-9b-it"], "intermediate_size": 128 * 3, "quantization_config": GROUPS_OF_128}
    with pytest.raises(InvalidUsageError, match="needs"):  # three groups: one GPU or none
        plan_resources(served("gemma-2-9b-it", config=odd), Demand(gpu_memory_bytes=7_000_000_000))


def test_grouped_heads_are_repeated_beyond_their_number(served: Callable[..., ServedImage]) -> None:
    one = plan_resources(served(), Demand())  # 1 KV head: splitting it saves no cache
    two = plan_resources(served(), Demand(gpu_memory_bytes=one.gpu_memory_bytes - 1))
    assert two.gpus == 2
    saved = one.gpu_memory_bytes - two.gpu_memory_bytes
    assert saved == pytest.approx(one.weights_bytes / 2 / 0.9, abs=2)


def test_host_memory_holds_a_shard_and_may_hold_all_weights(served: Callable[..., ServedImage]) -> None:
    resources = plan_resources(served("gemma-3-27b-it"), Demand())
    assert resources.memory_request_bytes == 6 * GIB + 6_000_000_000
    assert resources.memory_limit_bytes == 6 * GIB + 1.2 * 54_860_000_000
    assert resources.node_disk_bytes == 2 * served("gemma-3-27b-it").size_bytes


def test_a_context_longer_than_the_models_is_refused(served: Callable[..., ServedImage]) -> None:
    with pytest.raises(InvalidUsageError, match="context of 32768 tokens, not 32769"):
        plan_resources(served(), Demand(max_model_len=32769))


def test_what_is_not_a_gemma_is_refused(served: Callable[..., ServedImage]) -> None:
    with pytest.raises(CheckpointError, match="not a Gemma"):
        plan_resources(served(config={"model_type": "llama"}), Demand())
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        plan_resources(served(config={"model_type": "gemma2", "max_position_embeddings": "8192"}), Demand())


def test_what_config_json_leaves_out_is_what_transformers_takes_it_for(served: Callable[..., ServedImage]) -> None:
    resources = plan_resources(served(config={"model_type": "gemma2"}), Demand())
    assert resources.max_model_len == 8192


@given(
    name=st.sampled_from(sorted(CONFIGS)),
    tokens=st.integers(1, 8191),
    concurrency=st.integers(1, 4),
    gpu_gb=st.integers(24, 200),
)
def test_more_asked_never_needs_less(
    served: Callable[..., ServedImage], name: str, tokens: int, concurrency: int, gpu_gb: int
) -> None:
    image, size = served(name), gpu_gb * 10**9
    less = plan_resources(image, Demand(max_model_len=tokens, concurrency=concurrency, gpu_memory_bytes=size))
    more = plan_resources(image, Demand(max_model_len=tokens + 1, concurrency=concurrency, gpu_memory_bytes=size))
    both = plan_resources(image, Demand(max_model_len=tokens, concurrency=concurrency + 1, gpu_memory_bytes=size))
    for larger in (more, both):
        assert larger.kv_cache_bytes > less.kv_cache_bytes
        assert larger.gpus * larger.gpu_memory_bytes >= less.gpu_memory_bytes
    assert max(less.gpu_memory_bytes, more.gpu_memory_bytes, both.gpu_memory_bytes) <= size
    assert less.memory_request_bytes <= less.memory_limit_bytes
