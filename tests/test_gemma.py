"""What is particular to Gemma, against transformers' own configurations and against numbers worked out by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.errors import CheckpointError
from gemma_pack.gemma import (
    FUSED_GROUPS,
    attention_implementation,
    decoder_linears,
    decoder_number,
    decoder_prefix,
    is_embedding_or_head,
    kv_cache_bytes,
    layer_types,
    require_bfloat16,
    require_gemma,
    require_supported,
    text_config,
)

if TYPE_CHECKING:
    from types import ModuleType

GEMMA_2_9B: dict[str, Any] = {
    "model_type": "gemma2",
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}
GEMMA_3_270M: dict[str, Any] = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "dtype": "bfloat16",
}
GEMMA_3_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024},
    "vision_config": {"model_type": "siglip_vision_model"},
}


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("config", "name", "attention"),
    [
        (GEMMA_2_9B, "Gemma 2", "eager"),
        (GEMMA_3_270M, "Gemma 3", "sdpa"),
        (GEMMA_3_4B, "Gemma 3 with vision", "sdpa"),
    ],
)
def test_supported_families(config: dict[str, Any], name: str, attention: str):
    assert require_supported(config).name == name
    assert attention_implementation(config) == attention


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gemma", "Gemma 1 is not supported yet"),
        ("gemma3n", "Gemma 3n is not supported yet"),
        ("gemma4_unified_text", "the decoder alone of Gemma 4 unified is not supported yet"),
        ("paligemma", "PaliGemma is not supported yet"),
        ("gemma9_text", "gemma9_text is not supported yet"),
        ("llama", "this is not a Gemma: config.json says model_type 'llama'"),
        (None, "this is not a Gemma: config.json says model_type None"),
        (["gemma2"], "this is not a Gemma: config.json says model_type ['gemma2']"),
    ],
)
def test_others_are_refused_by_name(model_type: object, message: str):
    with pytest.raises(CheckpointError) as caught:
        require_gemma({"model_type": model_type})
    assert caught.value.message == message
    assert caught.value.hint == (
        "supported are Gemma 2, Gemma 3, Gemma 3 with vision, Gemma 4, Gemma 4 with vision, Gemma 4 unified"
    )


def test_every_gemma_that_transformers_knows_is_supported_or_refused_by_name(transformers: ModuleType):
    known = {name for name in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES if "gemma" in name}
    supported = {"gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "gemma4_unified"}
    assert known > supported
    for model_type in supported:
        require_gemma({"model_type": model_type, "hidden_size_per_layer_input": 0})
    for model_type in known - supported:
        with pytest.raises(CheckpointError, match=r"\w is not supported yet$"):
            require_gemma({"model_type": model_type})


def test_an_embedding_model_is_no_decoder():
    with pytest.raises(CheckpointError, match="attends in both directions, as EmbeddingGemma does"):
        require_gemma(GEMMA_3_270M | {"use_bidirectional_attention": True})


def test_a_quantized_checkpoint_is_a_gemma_and_no_base():
    quantized = GEMMA_3_270M | {"quantization_config": {"quant_method": "compressed-tensors"}}
    assert require_gemma(quantized).name == "Gemma 3"
    with pytest.raises(CheckpointError, match="quantized already"):
        require_supported(quantized)
    require_supported(GEMMA_3_270M | {"quantization_config": None})


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("nested", [False, True])
def test_float16_is_refused_with_the_reason(key: str, nested: bool):
    config: dict[str, Any] = {"text_config": {key: "float16"}} if nested else {key: "float16"}
    with pytest.raises(CheckpointError, match="Gemma's activations overflow it") as caught:
        require_bfloat16(config)
    assert caught.value.hint == "use the bfloat16 checkpoint"


def test_the_dtype_of_the_whole_model_counts():
    require_bfloat16({"dtype": "bfloat16", "text_config": {"dtype": "float32"}})
    with pytest.raises(CheckpointError, match="float16"):
        require_bfloat16({"dtype": "float16", "text_config": {"dtype": "bfloat16"}})


def test_float32_is_refused_with_the_way_out():
    with pytest.raises(CheckpointError, match="the checkpoint is float32, not bfloat16") as caught:
        require_bfloat16({"torch_dtype": "float32"})
    assert "save_pretrained" in str(caught.value.hint)


def test_a_config_without_a_dtype_is_left_to_its_tensors():
    require_bfloat16({})


def test_the_text_part_of_a_config():
    assert text_config(GEMMA_3_4B)["num_hidden_layers"] == 34
    assert text_config(GEMMA_2_9B) is GEMMA_2_9B


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_the_three_forms_of_decoder_names(prefix: str):
    names = [f"{prefix}embed_tokens.weight", f"{prefix}layers.0.mlp.up_proj.weight", "vision_tower.embeddings.weight"]
    assert decoder_prefix(names) == prefix
    first = decoder_linears(GEMMA_3_270M, prefix)[0]
    assert first == [
        [f"{prefix}layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        [f"{prefix}layers.0.self_attn.o_proj"],
        [f"{prefix}layers.0.mlp.{name}" for name in ("gate_proj", "up_proj")],
        [f"{prefix}layers.0.mlp.down_proj"],
    ]


def test_every_layer_has_every_linear_once():
    names = [name for layer in decoder_linears(GEMMA_3_270M, "model.") for group in layer for name in group]
    assert len(names) == len(set(names)) == 18 * sum(map(len, FUSED_GROUPS)) == 126


def test_the_names_are_those_of_transformers_models(transformers: ModuleType):
    import torch

    config = transformers.Gemma3TextConfig(num_hidden_layers=2, hidden_size=8, intermediate_size=8, vocab_size=8)
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(config)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    prefix = decoder_prefix(dict(model.named_parameters()))
    assert linear == {name for layer in decoder_linears(config.to_dict(), prefix) for group in layer for name in group}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], 0),
        (["model.layers.0.mlp.up_proj.weight", "model.not_embed_tokens.weight"], 0),
        (["model.embed_tokens.weight", "draft.model.embed_tokens.weight"], 2),
    ],
)
def test_a_checkpoint_has_one_decoder(names: list[str], found: int):
    with pytest.raises(CheckpointError, match=rf"expected one embed_tokens\.weight in the checkpoint, found {found}"):
        decoder_prefix(names)


def test_layer_types_are_those_of_transformers(transformers: ModuleType):
    for layers in (1, 6, 18, 26, 42):
        gemma2 = transformers.Gemma2Config(num_hidden_layers=layers)
        assert layer_types({"model_type": "gemma2", "num_hidden_layers": layers}) == gemma2.layer_types
        gemma3 = transformers.Gemma3TextConfig(num_hidden_layers=layers)
        assert layer_types({"model_type": "gemma3_text", "num_hidden_layers": layers}) == gemma3.layer_types
        assert layer_types({"model_type": "gemma3", "text_config": {"num_hidden_layers": layers}}) == gemma3.layer_types
        assert layer_types(gemma3.to_dict()) == gemma3.layer_types
    pattern = {"num_hidden_layers": 8, "sliding_window_pattern": 4}
    assert layer_types({"model_type": "gemma3_text", **pattern}) == transformers.Gemma3TextConfig(**pattern).layer_types


def test_defaults_are_those_of_transformers(transformers: ModuleType):
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "sliding_window", "max_position_embeddings",
    )  # fmt: skip
    gemma2, gemma3 = transformers.Gemma2Config(), transformers.Gemma3TextConfig()
    for name in names:
        assert decoder_number({"model_type": "gemma2"}, name) == getattr(gemma2, name)
        assert decoder_number({"model_type": "gemma3", "text_config": {}}, name) == getattr(gemma3, name)


@pytest.mark.parametrize(
    "kinds", [["full_attention"], "full_attention", ["full_attention", "chunked_attention"], ["full_attention", []], {}]
)
def test_layer_types_that_make_no_sense_are_refused(kinds: object):
    with pytest.raises(CheckpointError, match="layer_types does not say"):
        layer_types({"model_type": "gemma3_text", "num_hidden_layers": 2, "layer_types": kinds})


def test_more_layers_than_any_gemma_has_are_refused():
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1000000000000, and no Gemma"):
        decoder_number({"model_type": "gemma3_text", "num_hidden_layers": 10**12}, "num_hidden_layers")


@pytest.mark.parametrize("value", ["42", 0, -1, 4.0, None, True])
def test_numbers_that_are_none_are_refused(value: object):
    with pytest.raises(CheckpointError, match=r"config\.json: num_hidden_layers is .*, not a whole number above zero"):
        layer_types({"model_type": "gemma2", "num_hidden_layers": value})


@pytest.mark.parametrize(
    ("config", "tokens", "size_bytes"),
    [
        # 2 (K and V) x 8 heads x 256 x 2 bytes = 8192 bytes a token and layer; 21 full and 21 sliding layers
        (GEMMA_2_9B, 1, 42 * 8192),
        (GEMMA_2_9B, 4096, 42 * 4096 * 8192),
        (GEMMA_2_9B, 8192, (21 * 8192 + 21 * 4096) * 8192),
        # 2 x 1 head x 256 x 2 bytes = 1024; layers 6, 12 and 18 of 18 are full, the window is 512
        (GEMMA_3_270M, 512, 18 * 512 * 1024),
        (GEMMA_3_270M, 32_768, (3 * 32_768 + 15 * 512) * 1024),
        # 2 x 4 heads (the default) x 256 x 2 bytes = 4096; layers 6, 12, 18, 24 and 30 of 34 are full
        (GEMMA_3_4B, 10_000, (5 * 10_000 + 29 * 1024) * 4096),
    ],
)
def test_kv_cache_by_hand(config: dict[str, Any], tokens: int, size_bytes: int):
    assert kv_cache_bytes(config, tokens) == size_bytes
    assert kv_cache_bytes(config, tokens, bytes_per_value=1) * 2 == size_bytes


def test_tokens_in_flight_widen_the_window_and_no_more():
    assert kv_cache_bytes(GEMMA_2_9B, 8192, in_flight_tokens=1000) == (21 * 8192 + 21 * 5096) * 8192
    assert kv_cache_bytes(GEMMA_2_9B, 8192, in_flight_tokens=10_000) == 42 * 8192 * 8192


def test_a_decoder_without_sliding_layers_needs_no_window():
    config = GEMMA_3_270M | {"layer_types": ["full_attention"] * 18, "sliding_window": None}
    assert kv_cache_bytes(config, 1000) == 18 * 1000 * 1024


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("model.embed_tokens.weight", True),
        ("lm_head", True),
        ("language_model.lm_head.weight", True),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("my_lm_head.weight", False),
        ("lm_head.weight.scale", False),
    ],
)
def test_embedding_and_head(name: str, is_one: bool):
    assert is_embedding_or_head(name) is is_one
