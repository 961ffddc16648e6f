"""bitsandbytes' two formats, as transformers loads them and vLLM did until it dropped them (0.32 has no loader).

The codes are bitsandbytes' own, from its functions, called on pieces of a weight; the names are those that its
`Linear4bit` and `Linear8bitLt` save. Always on the CPU: both schemes take milliseconds a layer there or on a GPU, and
so the bytes do not depend on the device.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import torch
from bitsandbytes import functional

from gemma_pack.quantization.layout import NF4_BLOCK, NF4_NESTED_BLOCK, NF4_STATE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gemma_pack.recipe import Recipe

_NF4_STATE: Final = "weight.quant_state.bitsandbytes__nf4"


class Int8Rows:
    """LLM.int8() (arXiv 2208.07339): each row is divided by its largest magnitude, kept as SCB, and times 127."""

    divisor = 1
    codes = "weight"

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the codes and SCB of bfloat16 [rows, columns], rounded in float32."""
        codes, largest, _ = functional.int8_vectorwise_quant(rows.float())
        return {"weight": codes, "SCB": largest}

    def finish(self, shape: tuple[int, ...], joined: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add `weight_format`: 0 is row-major, the one that is left."""
        del shape
        return {**joined, "weight_format": torch.tensor(0, dtype=torch.uint8)}


class Nf4Rows:
    """NF4 with double quantization (arXiv 2305.14314, sections 3 and 4)."""

    divisor = NF4_BLOCK
    """So many rows hold whole blocks, whatever their length."""
    codes = "weight"

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the packed codes, uint8 [elements / 2, 1], and absmax, float32 [blocks], of bfloat16 rows."""
        codes, state = functional.quantize_4bit(rows, blocksize=NF4_BLOCK, quant_type="nf4")
        return {"weight": codes, "weight.absmax": state.absmax, "weight.quant_map": state.code}

    def finish(self, shape: tuple[int, ...], joined: dict[str, Tensor]) -> dict[str, Tensor]:
        """Quantize absmax in its turn, around its mean, as `quantize_4bit` does for a whole weight."""
        mean = joined["weight.absmax"].mean()
        absmax, nested = functional.quantize_blockwise(joined["weight.absmax"] - mean, blocksize=NF4_NESTED_BLOCK)
        state = {
            "quant_type": "nf4",
            "blocksize": NF4_BLOCK,
            "dtype": "bfloat16",
            "shape": list(shape),
            "nested_blocksize": NF4_NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": mean.item(),
        }
        encoded = json.dumps(state).encode().ljust(NF4_STATE_BYTES)
        return {
            "weight.absmax": absmax,
            "weight.quant_map": joined["weight.quant_map"][:16],
            "weight.nested_absmax": nested.absmax,
            "weight.nested_quant_map": nested.code,
            _NF4_STATE: torch.frombuffer(bytearray(encoded), dtype=torch.uint8),
        }


def bitsandbytes_config(recipe: Recipe, ignore: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json, as transformers' `BitsAndBytesConfig` writes it.

    Args:
        recipe: of scheme BNB_INT8 or BNB_NF4.
        ignore: modules that stay in bf16, the head among them: given any, transformers adds none of its own. Those
            that hold others are `re:.*name.*`; transformers compares beginnings (`should_convert_module`), vLLM
            compared parts between dots (`is_layer_skipped_bnb`), so both spellings of such a name stand here.
    """
    from transformers import BitsAndBytesConfig

    towers = [name.removeprefix("re:").strip(".*") for name in ignore if name.startswith("re:")]
    whole = [name for name in ignore if not name.startswith("re:")]
    skipped = [*whole, *towers, *(f"model.{tower}" for tower in towers)]
    if recipe.scheme == "BNB_INT8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=skipped,
        )
    dumped: dict[str, Any] = config.to_dict()
    return dumped
