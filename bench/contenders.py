"""What is measured beside gemma-pack's recipes: other tools' quantization of the same base, from the same windows.

    python bench/contenders.py NAME BASE TEXT SEED TARGET

leaves in TARGET a checkpoint that transformers loads. Calibration is 64 windows of 512 tokens of the file TEXT, drawn
by SEED; `bench/quality.py` calls this in a process for each. Settings are those that each tool's users get by default.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from gemma_pack.texts import load_windows

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES, SEQUENCE_LENGTH = 64, 512
WINDOWS_AT_ONCE = 8
"""In one forward pass of calibration, which changes the time alone."""
GGUF_BITS = 4.5
"""Of a Q4_0 weight: 32 codes of 4 bits and a float16 scale."""


def windows_of(base: Path, text: Path, seed: int) -> torch.Tensor:
    """Return the calibration windows, int64 [windows, tokens]."""
    ids = load_windows(str(text), "calibration", base, samples=SAMPLES, sequence_length=SEQUENCE_LENGTH, seed=seed).ids
    return torch.from_numpy(ids).long()


def bf16(base: Path) -> Any:  # noqa: ANN401 - a transformers model
    """Load the base."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


def llm_compressor(scheme: str, *, gptq: bool = False) -> Callable[[Path, torch.Tensor, Path], None]:
    """Return llm-compressor's one-shot run with a preset scheme, everything else at its defaults."""

    def make(base: Path, windows: torch.Tensor, target: Path) -> None:
        from compressed_tensors.quantization import preset_name_to_scheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier

        rows = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
        modifier = GPTQModifier if gptq else QuantizationModifier
        preset = preset_name_to_scheme(scheme, ["Linear"])
        oneshot(
            model=bf16(base),
            processor=AutoTokenizer.from_pretrained(base),
            dataset=Dataset.from_dict(rows),
            recipe=modifier(config_groups={"group_0": preset}, ignore=["lm_head"]),
            max_seq_length=SEQUENCE_LENGTH,
            num_calibration_samples=SAMPLES,
            shuffle_calibration_samples=False,
            batch_size=WINDOWS_AT_ONCE,
            output_dir=str(target),
        )

    return make


def auto_round(base: Path, windows: torch.Tensor, target: Path) -> None:
    """Run AutoRound, 200 iterations a layer, and store what its codes stand for in bf16."""
    from auto_round import AutoRound

    model = bf16(base)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(base),
        scheme="W4A16",
        dataset=[{"input_ids": window[None]} for window in windows],
        nsamples=SAMPLES,
        seqlen=SEQUENCE_LENGTH,
        device_map="cpu",
    )
    rounder.quantize()  # in place
    model.save_pretrained(target)


def bitsandbytes(settings: dict[str, Any]) -> Callable[[Path, torch.Tensor, Path], None]:
    """Return transformers' quantization by bitsandbytes while it loads; needs no text."""

    def make(base: Path, windows: torch.Tensor, target: Path) -> None:
        del windows
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
        model.save_pretrained(target)

    return make


def gguf_q4_0(base: Path, windows: torch.Tensor, target: Path) -> None:
    """Round the decoder's linears to Q4_0 by the `gguf` package and store what they stand for in bf16."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    del windows
    model = bf16(base)
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            codes = quantize(module.weight.detach().float().numpy(), GGMLQuantizationType.Q4_0)
            rounded = dequantize(codes, GGMLQuantizationType.Q4_0)
            module.weight.data = torch.from_numpy(rounded).to(torch.bfloat16)
    model.save_pretrained(target)


MAKERS: dict[str, Callable[[Path, torch.Tensor, Path], None]] = {
    "llm-compressor W4A16": llm_compressor("W4A16", gptq=True),
    "llm-compressor W8A8": llm_compressor("W8A8", gptq=True),
    "llm-compressor FP8": llm_compressor("FP8"),
    "llm-compressor NVFP4": llm_compressor("NVFP4"),
    "llm-compressor W8A16": llm_compressor("W8A16"),
    "llm-compressor FP8_DYNAMIC": llm_compressor("FP8_DYNAMIC"),
    "llm-compressor FP8_BLOCK": llm_compressor("FP8_BLOCK"),
    "AutoRound W4A16": auto_round,
    "bitsandbytes int8": bitsandbytes({"load_in_8bit": True}),
    "bitsandbytes nf4": bitsandbytes(
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    ),
    "GGUF Q4_0": gguf_q4_0,
}


def main() -> None:
    """Make one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(MAKERS))
    parser.add_argument("base", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    partial = options.target.with_name(f"{options.target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    MAKERS[options.name](options.base, windows_of(options.base, options.text, options.seed), partial)
    partial.rename(options.target)


if __name__ == "__main__":
    main()
