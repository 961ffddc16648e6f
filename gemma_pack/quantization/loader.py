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

from gemma_pack.errors import QuantizationError
from gemma_pack.gemma import decoder_linears, decoder_number, decoder_prefix, linear_shape, norm_shapes, spellings
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


def prove_loadable(variant: Checkpoint, recipe: Recipe) -> LoaderProof:
    """Compare the finished variant with what servers expect of its family and scheme.

    Raises:
        QuantizationError: something is missing, left over, of another dtype or shape, or at odds with the ignore list.
    """
    prefix = decoder_prefix(variant.tensors)
    if prefix not in _PREFIXES.get(str(variant.config["model_type"]), ("model.",)):
        raise _refusal(f"the decoder's names begin with {prefix!r}, which no server knows")
    groups = [group for layer in decoder_linears(variant.config, prefix) for group in layer]
    kept = {name for group in groups for name in group if _in_bf16(variant, name)}
    expected = _embedding_and_norms(variant, prefix)
    if recipe.kv_cache:
        attentions = [group[0].rpartition(".")[0] for group in groups if group[0].endswith("q_proj")]
        scales = [scale for attention in attentions for scale in stored_cache_scales(attention)]
        expected |= {scale.name: (scale.dtype, scale.shape) for scale in scales}
    for group in groups:
        if kept.intersection(group) and not kept.issuperset(group):
            raise _refusal(f"servers fuse {', '.join(group)}, and they are quantized two ways")
        for name in group:
            expected |= _expected_linear(variant, name, recipe, kept)
    _compare(variant, expected, prefix)
    _check_outside(variant, prefix)
    linears = sum(map(len, groups))
    return LoaderProof(decoder_tensors=len(expected), quantized=linears - len(kept), in_bf16=len(kept))


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


def _in_bf16(variant: Checkpoint, module: str) -> bool:
    info = variant.tensors.get(f"{module}.weight")
    return info is not None and info.dtype == "BF16"


def _embedding_and_norms(variant: Checkpoint, prefix: str) -> Expected:
    embedding = f"{prefix}embed_tokens.weight"
    rows = variant.tensors[embedding].shape[0]
    norms: Expected = {name: ("BF16", shape) for name, shape in norm_shapes(variant.config, prefix).items()}
    return {embedding: ("BF16", (rows, decoder_number(variant.config, "hidden_size"))), **norms}


def _expected_linear(variant: Checkpoint, module: str, recipe: Recipe, kept: set[str]) -> Expected:
    for spelling in spellings(module):
        if is_ignored(spelling, variant.config) != (module in kept):
            raise _refusal(
                f"{module} is {'in bf16' if module in kept else 'quantized'}, and the ignore list of config.json "
                f"{'does not name' if module in kept else 'names'} {spelling}"
            )
    shape = linear_shape(variant.config, module)
    if module in kept:
        return {f"{module}.weight": ("BF16", shape)}
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in stored_tensors(module, shape, recipe)}


def _compare(variant: Checkpoint, expected: Expected, prefix: str) -> None:
    for name, (dtype, shape) in expected.items():
        info = variant.tensors.get(name)
        if info is None:
            raise _refusal(f"{name} is missing")
        if (info.dtype, info.shape) != (dtype, shape):
            raise _refusal(f"{name} is {info.dtype} {list(info.shape)}, and servers expect {dtype} {list(shape)}")
    left_over = sorted(name for name in variant.tensors if name.startswith(prefix) and name not in expected)
    if left_over:
        raise _refusal(f"{left_over[0]} has no place in servers' class of this model")


def _check_outside(variant: Checkpoint, prefix: str) -> None:
    """Check the head, and that linear layers outside of the decoder are in bf16 and said to be."""
    if not is_ignored("lm_head", variant.config):
        raise _refusal("the ignore list of config.json does not name lm_head")
    for name, info in variant.tensors.items():
        if name.startswith(prefix) or not name.endswith(".weight") or len(info.shape) != 2:
            continue
        if info.dtype != "BF16":
            raise _refusal(f"{name} is {info.dtype}, outside of the decoder")
        module = name.removesuffix(".weight")
        for spelling in spellings(module):
            if not is_ignored(spelling, variant.config):
                raise _refusal(f"{module} is in bf16, and the ignore list of config.json does not name {spelling}")


def _refusal(problem: str) -> QuantizationError:
    return QuantizationError(
        f"no server would load the variant: {problem}; nothing was kept",
        hint="this is a defect of gemma-pack or of the base: please report it with the versions and the model's name",
    )
