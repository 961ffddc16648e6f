"""The proof that servers find in a finished variant what their Gemma classes expect.

Read from the headers and config.json alone, as a server reads them: the decoder's names, the dtypes and shapes of
each layer's tensors by config.json's own numbers, each fused matrix quantized one way, and an ignore list
that names what is in bf16 and nothing else. What fails here fails in vLLM minutes later, after the push, with
`KeyError: ...weight_scale` or a shape that does not fit (llm-compressor issues 1306 and 1546).

Sources, vLLM 0.32: `packed_modules_mapping`, `hf_to_vllm_mapper` and the modules' `__init__` of
vllm/model_executor/models/gemma2.py, gemma3.py, gemma4.py and their multimodal files; `should_ignore_layer` in
compressed_tensors/utils.py. transformers 5.17: `should_convert_module` in quantizers/quantizers_utils.py.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gemma_pack.errors import CheckpointError, QuantizationError
from gemma_pack.gemma import (
    decoder_linears,
    decoder_number,
    decoder_prefix,
    linear_shape,
    norm_shapes,
    spellings,
    text_config,
)
from gemma_pack.quantization.heads import copied_heads, stored_heads
from gemma_pack.quantization.layout import stored_cache_scales, stored_tensors
from gemma_pack.record import LoaderProof

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.recipe import Recipe

    Expected = dict[str, tuple[str, tuple[int, ...]]]
    """Dtype, as safetensors names it, and shape by a tensor's name."""

_PREFIXES = dict.fromkeys(("gemma3", "gemma4", "gemma4_unified"), ("language_model.model.", "model.language_model."))
"""What stands before the decoder's names in checkpoints with a vision tower; `model.` in all others."""


class _MisfitError(Exception):
    """What no server would load, in words."""


def require_servable(base: Checkpoint) -> None:
    """Refuse, before any work, a base that no server would load what is made of.

    Raises:
        CheckpointError: something of the decoder is missing, left over or of another shape than config.json says, or
            the head is one that vLLM has no place for.
    """
    try:
        prefix = _known_prefix(base)
        linears = [name for layer in decoder_linears(base.config, prefix) for group in layer for name in group]
        expected = _embedding_and_norms(base, prefix)
        expected |= {f"{name}.weight": ("BF16", linear_shape(base.config, name)) for name in linears}
        _compare(base, expected, prefix)
        rows, said = base.tensors[f"{prefix}embed_tokens.weight"].shape[0], text_config(base.config).get("vocab_size")
        if said not in (None, rows):
            raise _MisfitError(f"the embedding has {rows} rows, and config.json says vocab_size {said}")
        others = stored_heads(base) - copied_heads(base)
        if others and base.config["model_type"] == "gemma2":
            raise _MisfitError(f"{min(others)} is a head of its own, and vLLM's Gemma 2 has the embedding alone")
    except _MisfitError as error:
        raise CheckpointError(
            f"no server would load what is made of {base.directory}: {error}",
            hint="save the checkpoint again from transformers, with the config.json of its own model",
        ) from error


def prove_loadable(variant: Checkpoint, recipe: Recipe) -> LoaderProof:
    """Compare the finished variant with what servers expect of its family and scheme.

    Raises:
        QuantizationError: something is missing, left over, of another dtype or shape, or at odds with the ignore list.
    """
    try:
        return _proof(variant, recipe)
    except _MisfitError as error:
        raise QuantizationError(
            f"no server would load the variant: {error}; nothing was kept",
            hint="this is a defect of gemma-pack or of the base: "
            "please report it with the versions and the model's name",
        ) from error


def _proof(variant: Checkpoint, recipe: Recipe) -> LoaderProof:
    prefix = _known_prefix(variant)
    groups = [group for layer in decoder_linears(variant.config, prefix) for group in layer]
    kept = {name for group in groups for name in group if _in_bf16(variant, name)}
    expected = _embedding_and_norms(variant, prefix)
    if recipe.kv_cache:
        attentions = [group[0].rpartition(".")[0] for group in groups if group[0].endswith("q_proj")]
        scales = [scale for attention in attentions for scale in stored_cache_scales(attention)]
        expected |= {scale.name: (scale.dtype, scale.shape) for scale in scales}
    for group in groups:
        _check_fused_values(variant, group, kept)
        if kept.intersection(group) and not kept.issuperset(group):
            raise _MisfitError(f"servers fuse {', '.join(group)}, and they are quantized two ways")
        for name in group:
            expected |= _expected_linear(variant, name, recipe, kept)
    _compare(variant, expected, prefix)
    _check_outside(variant, prefix)
    linears = sum(map(len, groups))
    return LoaderProof(decoder_tensors=len(expected), quantized=linears - len(kept), in_bf16=len(kept))


def fused_values(module: str) -> str:
    """Return the name of the values beside keys that make them too, as in a Gemma 4's full layers; else the same name.

    vLLM fuses the three there as well, and asks for each of them whether it is ignored (`packed_modules_mapping` of its
    Gemma4ForCausalLM; "Found different quantization schemes" of its `should_ignore_layer`).
    """
    return module.removesuffix("k_proj") + "v_proj" if module.endswith(".k_proj") else module


def is_ignored(module: str, config: Mapping[str, Any]) -> bool:
    """Say whether the readers of config.json's quantization_config take a linear layer for unquantized."""
    quantization = config["quantization_config"]
    if quantization["quant_method"] == "bitsandbytes":
        skipped = quantization["llm_int8_skip_modules"]
        return any(re.match(entry, module) or module.endswith(entry) for entry in skipped)
    return any(
        re.match(entry.removeprefix("re:"), module) if entry.startswith("re:") else entry == module
        for entry in quantization["ignore"]
    )


def _known_prefix(checkpoint: Checkpoint) -> str:
    prefix = decoder_prefix(checkpoint.tensors)
    if prefix not in _PREFIXES.get(str(checkpoint.config["model_type"]), ("model.",)):
        raise _MisfitError(f"the decoder's names begin with {prefix!r}, which no server knows")
    return prefix


def _in_bf16(variant: Checkpoint, module: str) -> bool:
    info = variant.tensors.get(f"{module}.weight")
    return info is not None and info.dtype == "BF16"


def _embedding_and_norms(variant: Checkpoint, prefix: str) -> Expected:
    embedding = f"{prefix}embed_tokens.weight"
    rows = variant.tensors[embedding].shape[0]
    norms: Expected = {name: ("BF16", shape) for name, shape in norm_shapes(variant.config, prefix).items()}
    return {embedding: ("BF16", (rows, decoder_number(variant.config, "hidden_size"))), **norms}


def _check_ignored(variant: Checkpoint, module: str, asked: str, kept: set[str]) -> None:
    """Check that the ignore list says of `asked`, under each of its names, what has become of `module`."""
    for spelling in spellings(asked):
        if is_ignored(spelling, variant.config) != (module in kept):
            raise _MisfitError(
                f"{module} is {'in bf16' if module in kept else 'quantized'}, and the ignore list of config.json "
                f"{'does not name' if module in kept else 'names'} {spelling}"
            )


def _check_fused_values(variant: Checkpoint, group: list[str], kept: set[str]) -> None:
    for name in group:
        if fused_values(name) not in group:
            _check_ignored(variant, name, fused_values(name), kept)


def _expected_linear(variant: Checkpoint, module: str, recipe: Recipe, kept: set[str]) -> Expected:
    _check_ignored(variant, module, module, kept)
    shape = linear_shape(variant.config, module)
    if module in kept:
        return {f"{module}.weight": ("BF16", shape)}
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in stored_tensors(module, shape, recipe)}


def _compare(variant: Checkpoint, expected: Expected, prefix: str) -> None:
    for name, (dtype, shape) in expected.items():
        info = variant.tensors.get(name)
        if info is None:
            raise _MisfitError(f"{name} is missing")
        if (info.dtype, info.shape) != (dtype, shape):
            raise _MisfitError(f"{name} is {info.dtype} {list(info.shape)}, and servers expect {dtype} {list(shape)}")
    left_over = sorted(name for name in variant.tensors if name.startswith(prefix) and name not in expected)
    if left_over:
        raise _MisfitError(f"{left_over[0]} has no place in servers' class of this model")


def _check_outside(variant: Checkpoint, prefix: str) -> None:
    """Check the head, and that linear layers outside of the decoder are in bf16 and said to be."""
    if not is_ignored("lm_head", variant.config):
        raise _MisfitError("the ignore list of config.json does not name lm_head")
    for name, info in variant.tensors.items():
        if name.startswith(prefix) or not name.endswith(".weight") or len(info.shape) != 2:
            continue
        if info.dtype != "BF16":
            raise _MisfitError(f"{name} is {info.dtype}, outside of the decoder")
        module = name.removesuffix(".weight")
        for spelling in spellings(module):
            if not is_ignored(spelling, variant.config):
                raise _MisfitError(f"{module} is in bf16, and the ignore list of config.json does not name {spelling}")
