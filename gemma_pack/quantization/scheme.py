"""What a recipe asks for, in the words of compressed-tensors, and the config that a server reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_pack.recipe import Recipe


def weight_arguments(recipe: Recipe) -> QuantizationArgs:
    """Return compressed-tensors' arguments for the weights."""
    weights = recipe.weights
    return QuantizationArgs(
        num_bits=weights.bits,
        type=weights.type,
        symmetric=weights.symmetric,
        strategy="group" if weights.group_size else "channel",
        group_size=weights.group_size,
        observer=weights.observer,
        actorder="static",
    )


def quantization_config(recipe: Recipe, ignore: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json: what vLLM and transformers load the variant by.

    Args:
        recipe: the recipe.
        ignore: module names of linear layers that stay in bf16, as servers know them.
    """
    packed = CompressionFormat.pack_quantized.value
    scheme = QuantizationScheme(targets=["Linear"], weights=weight_arguments(recipe), format=packed)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=packed,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return dumped


def describe(recipe: Recipe) -> str:
    """Return the scheme in a few words: `int4 weights in groups of 128`."""
    weights = recipe.weights
    span = f"in groups of {weights.group_size}" if weights.group_size else "with a scale an output channel"
    return f"{weights.type}{weights.bits} weights {span}"
