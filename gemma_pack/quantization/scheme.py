"""What a recipe asks for, in the words of compressed-tensors, and the config that a server reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_pack.recipe import Recipe

_FORMATS: Final = {
    "W4A16": "pack-quantized",
    "W8A16": "pack-quantized",
    "W8A8": "int-quantized",
    "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "NVFP4": "nvfp4-pack-quantized",
}
"""How compressed-tensors stores each of its preset schemes."""

_KV_CACHE: Final = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
"""What vLLM loads (`CompressedTensorsKVCacheMethod.validate_kv_cache_scheme`)."""

_WORDS: Final = {
    "W4A16": "int4 weights",
    "W8A16": "int8 weights",
    "W8A8": "int8 weights and activations",
    "FP8": "FP8 weights and activations, static scales",
    "FP8_DYNAMIC": "FP8 weights and activations, activations scaled as they come",
    "FP8_BLOCK": "FP8 weights in blocks of 128 x 128, activations scaled as they come",
    "NVFP4": "NVFP4 weights and activations",
    "BNB_INT8": "int8 weights of bitsandbytes",
    "BNB_NF4": "nf4 weights of bitsandbytes, scales quantized too",
}


def quantization_scheme(recipe: Recipe) -> QuantizationScheme:
    """Return compressed-tensors' preset of the recipe's scheme, with the recipe's groups and observer."""
    preset = preset_name_to_scheme(recipe.scheme, ["Linear"])
    # of scales of either sign upstream knows nothing; the name only informs whoever reads config.json
    observer = "memoryless_mse" if recipe.scales_have_signs else recipe.observer
    changes: dict[str, Any] = {"observer": observer}
    if recipe.group_size:
        changes |= {"strategy": "group", "group_size": recipe.group_size}
    if recipe.algorithm == "gptq":
        changes["actorder"] = "static"
    weights = QuantizationArgs(**{**preset.weights.model_dump(exclude_none=True), **changes})
    return QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=preset.input_activations,
        format=_FORMATS[recipe.scheme],
    )


def quantization_config(recipe: Recipe, ignore: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json: what vLLM and transformers load the variant by.

    Args:
        recipe: the recipe.
        ignore: module names of linear layers that stay in bf16, as servers know them.
    """
    if recipe.for_bitsandbytes:
        from gemma_pack.quantization.bitsandbytes import bitsandbytes_config

        return bitsandbytes_config(recipe, ignore)
    config = QuantizationConfig(
        config_groups={"group_0": quantization_scheme(recipe)},
        format=_FORMATS[recipe.scheme],
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
        kv_cache_scheme=_KV_CACHE if recipe.kv_cache else None,
    )
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return dumped


def describe(recipe: Recipe) -> str:
    """Return the scheme in a few words: `int4 weights in groups of 128`."""
    groups = f" in groups of {recipe.group_size}" if recipe.group_size else ""
    return _WORDS[recipe.scheme] + groups + (", FP8 KV cache" if recipe.kv_cache else "")
