"""All that is particular to the Gemma family.

Which members are supported, where their decoder lies in a checkpoint, which of its layers a server fuses,
which attention kernel is right, and what a token costs in KV cache.

Everything is read from config.json and tensor names, so nothing here needs torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from gemma_pack.checkpoint import Checkpoint

FUSED_GROUPS: Final = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The linear layers of a decoder layer by distinct input. vLLM fuses each group into one matrix
(`packed_modules_mapping` of its Gemma2ForCausalLM, Gemma3ForCausalLM and Gemma4ForCausalLM), so a group is quantized
one way. Gemma 4's full layers may have no v_proj: then k_proj makes the values too."""

NORM_BEFORE: Final = {"q_proj": "input_layernorm", "gate_proj": "pre_feedforward_layernorm"}
"""The norm whose output is the input of a group alone, by the group's first module. Gemma's post_attention_layernorm
stands behind attention's output and before no linear layer (transformers, `Gemma2DecoderLayer`)."""

_BLOCK_OF: Final = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
TOWERS: Final = (
    "vision_tower", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio", "vision_embedder"
)  # fmt: skip
"""Modules beside the decoder, none of which is ever quantized: of Gemma 3, then of Gemma 4 and Gemma 4 unified."""
_DEEPEST: Final = 128
"""More layers than any Gemma has; Gemma 3 27B has 62."""
_LAYER_TYPES: Final = ("sliding_attention", "full_attention")


@dataclass(frozen=True, slots=True)
class Family:
    """A supported member: its name for people and how it attends."""

    name: str
    attention: str
    """The kernel for transformers. Gemma 2 soft-caps attention logits, which its SDPA path does not do
    (transformers refuses it), so both sides of any comparison run eager."""
    other_attention: str | None = None
    """Another kernel that computes the same, where there is one: what it changes is arithmetic's noise."""


_FAMILIES: Final = {
    "gemma2": Family("Gemma 2", "eager"),
    "gemma3_text": Family("Gemma 3", "sdpa", "eager"),
    "gemma3": Family("Gemma 3 with vision", "sdpa", "eager"),
    "gemma4_text": Family("Gemma 4", "sdpa", "eager"),
    "gemma4": Family("Gemma 4 with vision", "sdpa", "eager"),
    "gemma4_unified": Family("Gemma 4 unified", "sdpa", "eager"),
}
_KNOWN_UNSUPPORTED: Final = {
    "gemma": "Gemma 1",
    "gemma3n": "Gemma 3n",
    "gemma4_assistant": "Gemma 4's assistant",
    "gemma4_unified_assistant": "Gemma 4 unified's assistant",
    "gemma4_unified_text": "the decoder alone of Gemma 4 unified",
    "paligemma": "PaliGemma",
    "recurrent_gemma": "RecurrentGemma",
    "shieldgemma2": "ShieldGemma 2",
    "t5gemma": "T5Gemma",
    "t5gemma2": "T5Gemma 2",
    "vaultgemma": "VaultGemma",
    "diffusion_gemma": "DiffusionGemma",
}
_DEFAULTS: Final = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
"""Of transformers' `Gemma2Config` and `Gemma3TextConfig`; a config.json may leave out what equals them."""
_OWN_DEFAULTS: Final = {
    "gemma2": {"max_position_embeddings": 8192},
    "gemma3_text": {"max_position_embeddings": 131_072},
    "gemma4_text": {"max_position_embeddings": 131_072, "num_hidden_layers": 30, "sliding_window": 512},
    "gemma4_unified_text": {"max_position_embeddings": 262_144, "num_hidden_layers": 30, "sliding_window": 1024},
}
"""Where the families differ; Gemma 4's are those of `Gemma4TextConfig` and `Gemma4UnifiedTextConfig`."""
_GEMMA4_FULL_HEAD_DIM: Final = 512
"""Of Gemma 4's full layers (`global_head_dim` of transformers' `Gemma4TextConfig`)."""


def require_supported(config: Mapping[str, Any]) -> Family:
    """Return the family of a checkpoint that is to be quantized, by its config.json.

    Raises:
        CheckpointError: not a Gemma, a Gemma that is not supported, already quantized, or float16.
    """
    family = require_gemma(config)
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            "the checkpoint is quantized already: config.json has a quantization_config",
            hint="start from the bf16 checkpoint of the model",
        )
    require_bfloat16(config)
    return family


def require_gemma(config: Mapping[str, Any]) -> Family:
    """Return the family of a checkpoint, quantized or not, by its config.json.

    Raises:
        CheckpointError: not a Gemma, or a Gemma that is not supported.
    """
    model_type = config.get("model_type")
    supported = f"supported are {', '.join(family.name for family in _FAMILIES.values())}"
    if not isinstance(model_type, str) or "gemma" not in model_type:
        raise CheckpointError(f"this is not a Gemma: config.json says model_type {model_type!r}", hint=supported)
    if model_type not in _FAMILIES:
        name = _KNOWN_UNSUPPORTED.get(model_type, model_type)
        raise CheckpointError(f"{name} is not supported yet", hint=supported)
    if text_config(config).get("use_bidirectional_attention") not in (None, False, "vision"):  # of images alone
        raise CheckpointError(
            "this Gemma attends in both directions, as EmbeddingGemma does, and that is not supported yet",
            hint=supported,
        )
    if reason := _not_dense(config):
        raise CheckpointError(f"this Gemma 4 {reason}, and that is not supported yet", hint=supported)
    return _FAMILIES[model_type]


def _not_dense(config: Mapping[str, Any]) -> str | None:
    """Return what sets a Gemma 4 apart from the dense ones (transformers, `Gemma4TextConfig`); None for all others."""
    decoder, kind = text_config(config), _decoder_type(config)
    if kind == "gemma4_text" and decoder.get("hidden_size_per_layer_input", 256):
        return "has embeddings for each layer, as E2B and E4B have"
    if kind.startswith("gemma4") and decoder.get("num_kv_shared_layers"):
        return "has layers that share keys and values, as E2B and E4B have"
    if kind == "gemma4_text" and (decoder.get("enable_moe_block") or decoder.get("num_experts")):
        return "is a mixture of experts, as 26B-A4B is"
    return None


def require_bfloat16(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if config.json asks for a dtype that Gemma does not survive.

    Gemma's activations pass 65504, the largest float16 (vLLM refuses it: `_FLOAT16_NOT_SUPPORTED_MODELS`).
    """
    parts = (config, text_config(config))  # transformers loads the whole model in the outer one
    dtype = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), "bfloat16")
    if dtype in ("float16", "half", "fp16"):
        raise CheckpointError(
            "the checkpoint is float16, and Gemma's activations overflow it", hint="use the bfloat16 checkpoint"
        )
    if dtype != "bfloat16":
        raise CheckpointError(
            f"the checkpoint is {dtype}, not bfloat16",
            hint="use the bfloat16 checkpoint, or save this one as bfloat16 first: "
            "AutoModelForCausalLM.from_pretrained(DIR, dtype='bfloat16').save_pretrained(NEW)",
        )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that describes the decoder."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def decoder_number(config: Mapping[str, Any], name: str) -> int:
    """Return a number of the decoder, such as `num_key_value_heads`: config.json's, or transformers' default for it.

    Raises:
        CheckpointError: it is there, and no whole number above zero, or of more layers than any Gemma has.
    """
    defaults = _DEFAULTS | _OWN_DEFAULTS[_decoder_type(config)]
    return _positive(name, text_config(config).get(name, defaults[name]))


def layer_number(config: Mapping[str, Any], name: str, layer: int) -> int:
    """Return `head_dim` or `num_key_value_heads` of a decoder layer.

    Gemma 4's full layers have their own: in `per_layer_config`, which transformers writes since 5.17, else in
    `global_head_dim` and, where k_proj makes the values too, `num_global_key_value_heads` (`Gemma4TextConfig`).

    Raises:
        CheckpointError: it is there, and no whole number above zero.
    """
    decoder = text_config(config)
    own: dict[str, Any] = {}
    if isinstance(overrides := decoder.get("per_layer_config"), dict):
        named = (value for key, value in overrides.items() if key.isdigit() and int(key) == layer)  # "07" is 7
        own = next((value for value in named if isinstance(value, dict)), {})
    elif _decoder_type(config).startswith("gemma4") and layer_types(config)[layer] == "full_attention":
        own = {"head_dim": decoder.get("global_head_dim", _GEMMA4_FULL_HEAD_DIM)}
        if decoder.get("attention_k_eq_v") and decoder.get("num_global_key_value_heads") is not None:
            own["num_key_value_heads"] = decoder["num_global_key_value_heads"]
    return _positive(name, own[name]) if name in own else decoder_number(config, name)


def _positive(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"config.json: {name} is {value!r}, not a whole number above zero", hint="fetch config.json again"
        )
    if name == "num_hidden_layers" and value > _DEEPEST:  # whoever wrote the config must not keep us counting
        raise CheckpointError(f"config.json: {name} is {value}, and no Gemma has more than {_DEEPEST}")
    return value


def norm_offset(config: Mapping[str, Any]) -> int:
    """Return what is added to a norm's weight to make its gain: 1, and in Gemma 4 nothing (`Gemma4RMSNorm`)."""
    return 0 if _decoder_type(config).startswith("gemma4") else 1


def attention_implementation(config: Mapping[str, Any]) -> str:
    """Return the attention kernel that transformers must use for this model."""
    return _FAMILIES[str(config["model_type"])].attention


def other_attention(config: Mapping[str, Any]) -> str | None:
    """Return another kernel that computes the same attention, or None."""
    return _FAMILIES[str(config["model_type"])].other_attention


def decoder_prefix(names: Iterable[str]) -> str:
    """Return what stands before `layers.0.…` and `embed_tokens.weight` in the decoder's tensor names.

    `model.` for text models; `language_model.model.` or `model.language_model.` beside a vision tower.

    Raises:
        CheckpointError: there is no embedding, or more than one decoder.
    """
    found = {match[1] for name in names if (match := re.fullmatch(r"((?:.+\.)?)embed_tokens\.weight", name))}
    if len(found) != 1:
        raise CheckpointError(
            f"expected one embed_tokens.weight in the checkpoint, found {len(found)}",
            hint="fetch the checkpoint again; adapters and partial exports cannot be quantized",
        )
    return found.pop()


def decoder_linears(config: Mapping[str, Any], prefix: str) -> list[list[list[str]]]:
    """Return the linear layers' module names: for each decoder layer, for each distinct input, the modules on it."""
    reuses_keys = _decoder_type(config).startswith("gemma4") and text_config(config).get("attention_k_eq_v")
    without_values = {
        layer for layer, kind in enumerate(layer_types(config)) if reuses_keys and kind == "full_attention"
    }
    return [
        [
            [
                f"{prefix}layers.{layer}.{_BLOCK_OF[module]}.{module}"
                for module in group
                if not (module == "v_proj" and layer in without_values)
            ]
            for group in FUSED_GROUPS
        ]
        for layer in range(decoder_number(config, "num_hidden_layers"))
    ]


def checkpoint_linears(checkpoint: Checkpoint) -> list[list[list[str]]]:
    """Return `decoder_linears` of a checkpoint, by its own configuration and names.

    Raises:
        CheckpointError: as `decoder_prefix`.
    """
    return decoder_linears(checkpoint.config, decoder_prefix(checkpoint.tensors))


def possible_groups() -> Iterator[list[str]]:
    """Yield the module names on each input of any supported Gemma, to judge a list of names without a model."""
    for prefix in ("model.", "language_model.model.", "model.language_model."):
        for layer in range(_DEEPEST):
            for group in FUSED_GROUPS:
                yield [f"{prefix}layers.{layer}.{_BLOCK_OF[module]}.{module}" for module in group]


def linear_shape(config: Mapping[str, Any], module: str) -> tuple[int, int]:
    """Return [rows, columns] of a decoder linear's weight by config.json (transformers, `Gemma3Attention`)."""
    layer = int(module.rpartition("layers.")[2].partition(".")[0])
    hidden, inner = decoder_number(config, "hidden_size"), decoder_number(config, "intermediate_size")
    dim = layer_number(config, "head_dim", layer)
    queries = dim * decoder_number(config, "num_attention_heads")
    keys = dim * layer_number(config, "num_key_value_heads", layer)
    shapes = {
        "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip
    return shapes[module.rpartition(".")[2]]


def norm_shapes(config: Mapping[str, Any], prefix: str) -> dict[str, tuple[int]]:
    """Return the shape of each of the decoder's norms, and of Gemma 4's factor on a whole layer, by its tensor's name.

    Sources: vLLM, `Gemma2Model`, `Gemma3Model` and `Gemma4DecoderLayer`.
    """
    hidden, kind = decoder_number(config, "hidden_size"), _decoder_type(config)
    found: dict[str, tuple[int]] = {f"{prefix}norm.weight": (hidden,)}
    for index in range(decoder_number(config, "num_hidden_layers")):
        layer = f"{prefix}layers.{index}"
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            found[f"{layer}.{place}_layernorm.weight"] = (hidden,)
        if kind != "gemma2":
            dim = layer_number(config, "head_dim", index)
            found |= {f"{layer}.self_attn.{head}_norm.weight": (dim,) for head in "qk"}
        if kind.startswith("gemma4"):
            found[f"{layer}.layer_scalar"] = (1,)
    return found


def spellings(module: str) -> tuple[str, ...]:
    """Return the names that a module of a model with a vision tower goes by, the given one first.

    transformers renamed them in 4.52, published checkpoints keep the old names, and vLLM maps the new ones to the old
    (`hf_to_vllm_mapper` of its Gemma3ForConditionalGeneration and Gemma4ForConditionalGeneration).
    """
    renamed = (
        ("model.language_model.", "language_model.model."),
        *((f"model.{tower}.", f"{tower}.") for tower in TOWERS),
    )
    for new, old in renamed:
        for one, other in ((new, old), (old, new)):
            if module.startswith(one):
                return module, other + module.removeprefix(one)
    return (module,)


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """Return `sliding_attention` or `full_attention` for each decoder layer.

    Where config.json does not list them: Gemma 2 alternates beginning with sliding, Gemma 3 has one full layer
    in `sliding_window_pattern` (transformers, `Gemma2Config` and `Gemma3TextConfig`), Gemma 4 one in six, and its last
    layer is always a full one (`Gemma4TextConfig`).
    """
    layers = decoder_number(config, "num_hidden_layers")
    kinds = text_config(config).get("layer_types")
    if kinds is None:
        pattern = 2 if _decoder_type(config) == "gemma2" else decoder_number(config, "sliding_window_pattern")
        kinds = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _LAYER_TYPES for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types does not say sliding_attention or full_attention for each of {layers} layers",
            hint="fetch config.json again",
        )
    last = "full_attention" if _decoder_type(config).startswith("gemma4") else kinds[-1]
    return [*kinds[:-1], last]


def kv_cache_bytes(
    config: Mapping[str, Any], tokens: int, *, bytes_per_value: int = 2, in_flight_tokens: int = 0
) -> int:
    """Return the bytes of KV cache for one sequence of `tokens` tokens; sliding layers keep one window.

    The sum over layers of 2 · kv_heads · head_dim · bytes · L, in sliding layers · min(L, window + in flight).

    A server holds more than the window while it prefills: also the tokens that it has scheduled and not yet settled
    (vLLM, `SlidingWindowSpec.max_admission_blocks_per_request`); `in_flight_tokens` says how many. And it keeps layers
    in groups of one size, and pads what does not fill its group (its `_get_kv_cache_groups_uniform_page_size`).
    """
    totals = dict.fromkeys(_LAYER_TYPES, 0)
    kinds = layer_types(config)
    for layer, kind in enumerate(kinds):
        kept = tokens
        if kind == "sliding_attention":
            kept = min(tokens, decoder_number(config, "sliding_window") + in_flight_tokens)
        heads, dim = (layer_number(config, name, layer) for name in ("num_key_value_heads", "head_dim"))
        totals[kind] += 2 * heads * dim * bytes_per_value * kept
    if in_flight_tokens and 0 not in totals.values():
        fewest, most = sorted(map(kinds.count, _LAYER_TYPES))
        group = most if 2 * most < 3 * fewest else fewest
        return sum(
            total * -(-kinds.count(kind) // group) * group // kinds.count(kind) for kind, total in totals.items()
        )
    return sum(totals.values())


def is_embedding_or_head(name: str) -> bool:
    """Say whether a module or tensor name is the (tied) embedding or the head."""
    return re.search(r"(^|\.)(embed_tokens|lm_head)(\.weight)?$", name) is not None


def _decoder_type(config: Mapping[str, Any]) -> str:
    """Return the decoder's own model_type: `gemma3_text` for `gemma3`."""
    for part in (text_config(config), config):
        kind = str(part.get("model_type", "")).removesuffix("_text")
        if kind in ("gemma2", "gemma3", "gemma4", "gemma4_unified"):
            return kind if kind == "gemma2" else f"{kind}_text"
    return "gemma3_text"
