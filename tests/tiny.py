"""Tiny random Gemmas: whole checkpoints that transformers loads in a blink, for tests that need no real language."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from gemma_pack.sources.gguf_tokenizer import PieceType, Vocabulary, tokenizer_json

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

Family = Literal["gemma2", "gemma3_text", "gemma3", "gemma4_text", "gemma4", "gemma4_unified"]

VOCABULARY_SIZE = 512
WORDS = "the of and to in is that it for with as was on by this are be not from model weight scale block layer error"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "max_position_embeddings": 512,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "initializer_range": 0.1,  # wide enough that the next tokens are not all equally likely
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
}


def write_tiny(directory: Path, family: Family = "gemma3_text", *, seed: int = 0) -> Path:
    """Write a random bf16 checkpoint with its tokenizer into `directory`, which it makes, and return it.

    Three layers (sliding, full, sliding), hidden size 128, 512 tokens, tied embeddings; RMSNorm weights are random too,
    because zeros would survive a rewrite that real ones do not. `gemma3` and `gemma4` have a vision tower of one layer.
    A Gemma 4 is sliding, sliding, full; its full layer has wider heads, fewer keys and no values of its own.
    """
    import torch

    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    model = _model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # Gemma 4's weight is the gain, the others' is what is added to 1
                parameter.normal_(float("gemma4" in family), 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.0)
    model.to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja of the tiny models into `directory`."""
    tokenizer = tokenizer_json(_vocabulary())
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    config = {
        "add_bos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "model_max_length": _TEXT["max_position_embeddings"],
        "tokenizer_class": "GemmaTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


def _model(family: Family) -> PreTrainedModel:
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        Gemma3Config,
        Gemma3ForCausalLM,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
    )

    if family.startswith("gemma4"):
        return _gemma4(family)
    if family == "gemma2":
        # Gemma 2's soft caps, at their published values, must have something to cap
        config: PretrainedConfig = Gemma2Config(**_TEXT, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
        return Gemma2ForCausalLM(config)
    if family == "gemma3_text":
        return Gemma3ForCausalLM(Gemma3TextConfig(**_TEXT))
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = Gemma3Config(
        text_config=_TEXT,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=508,
        eoi_token_index=509,
        image_token_index=510,
        tie_word_embeddings=True,
    )
    return Gemma3ForConditionalGeneration(config)


def _gemma4(family: Family) -> PreTrainedModel:
    from transformers import (
        Gemma4Config,
        Gemma4ForCausalLM,
        Gemma4ForConditionalGeneration,
        Gemma4TextConfig,
        Gemma4UnifiedConfig,
        Gemma4UnifiedForConditionalGeneration,
    )

    text = {name: value for name, value in _TEXT.items() if name != "query_pre_attn_scalar"} | {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_key_value_heads": 2,
        "global_head_dim": 128,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
    }
    images = {"boi_token_id": 506, "eoi_token_id": 507, "image_token_id": 508, "video_token_id": 509}
    sounds = {"boa_token_id": 504, "eoa_token_index": 505, "audio_token_id": 510}
    if family == "gemma4_unified":
        vision = {"patch_size": 4, "mm_embed_dim": 128, "mm_posemb_size": 16, "output_proj_dims": 128}
        config: PretrainedConfig = Gemma4UnifiedConfig(
            text_config=text, vision_config=vision, audio_config={"output_proj_dims": 128}, **images, **sounds
        )
        return Gemma4UnifiedForConditionalGeneration(config)
    text["hidden_size_per_layer_input"] = 0
    if family == "gemma4_text":
        return Gemma4ForCausalLM(Gemma4TextConfig(**text))
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "patch_size": 4,
        "position_embedding_size": 64,
    }
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision, **images, **sounds))


def _vocabulary() -> Vocabulary:
    """Return control tokens, the bytes, single characters, and the prefixes of a few words so that merges chain."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    user_defined = ["\n", "\n\n", "▁▁", "▁▁▁"]
    byte = [f"<0x{value:02X}>" for value in range(256)]
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    prefixes = {f"▁{word}"[:length] for word in WORDS.split() for length in range(2, len(word) + 2)}
    normal = sorted(prefixes, key=lambda piece: (len(piece), piece)) + characters
    pieces = [*control, *user_defined, *byte, *normal]
    types = [
        *[PieceType.CONTROL] * len(control),
        *[PieceType.USER_DEFINED] * len(user_defined),
        *[PieceType.BYTE] * len(byte),
        *[PieceType.NORMAL] * len(normal),
    ]
    unused = [f"<unused{number}>" for number in range(VOCABULARY_SIZE - len(pieces))]
    scores = [float(-index) for index in range(VOCABULARY_SIZE)]
    return Vocabulary([*pieces, *unused], scores, [*types, *[PieceType.CONTROL] * len(unused)])
