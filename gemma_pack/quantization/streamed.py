"""The data-free path: linear layers that a server fuses are read, rounded and written, a group at a time.

No model is built and no text is read, so memory holds one group of layers whatever the model's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_pack.gemma import decoder_linears, decoder_prefix
from gemma_pack.quantization.decoder import read_tensor
from gemma_pack.quantization.packing import pack
from gemma_pack.quantization.rounding import round_group
from gemma_pack.quantization.scheme import quantization_scheme

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Reporter
    from gemma_pack.quantization.journal import Journal
    from gemma_pack.recipe import Recipe


def quantize_streamed(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    ignored: Collection[str],
    device: torch.device,
    journal: Journal,
    reporter: Reporter,
) -> None:
    """Round each decoder layer's linears to nearest and leave them packed in the journal, as `quantize_layers` does."""
    scheme = quantization_scheme(recipe)
    layers = decoder_linears(checkpoint.config, decoder_prefix(checkpoint.tensors))
    with reporter.progress("quantize layers", len(layers)) as task:
        for index, groups in enumerate(layers):
            if journal.load(f"layer-{index:03}") is None:
                tensors: dict[str, torch.Tensor] = {}
                for group in groups:
                    if group[0] not in ignored:
                        weights = [read_tensor(checkpoint, f"{name}.weight").to(device) for name in group]
                        rounded = round_group(weights, scheme.weights, None, recipe)
                        for name, linear in zip(group, rounded, strict=True):
                            tensors |= pack(name, linear, scheme)
                journal.save(f"layer-{index:03}", tensors)
            task.advance()
