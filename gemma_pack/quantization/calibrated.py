"""The calibrated path: decoder layer by decoder layer.

For each layer: run all calibration windows through it and gather the statistics of each distinct input; round its
linear layers; run the windows through the rounded layer, so that the next one calibrates on what it
will really see. Only that layer's weights and the windows' hidden states are in memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gemma_pack.gemma import decoder_linears
from gemma_pack.quantization.decoder import Decoder
from gemma_pack.quantization.packing import pack, unpack
from gemma_pack.quantization.rounding import InputStatistics, round_group
from gemma_pack.quantization.scheme import quantization_scheme

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import numpy as np
    from torch import Tensor, nn

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Reporter
    from gemma_pack.quantization.journal import Journal
    from gemma_pack.recipe import Recipe

_TOKENS_A_BATCH = 4096
"""Tokens in one forward call: enough to keep two cores or a GPU busy, few enough for 2 GB of memory."""


def quantize_layers(
    checkpoint: Checkpoint,
    recipe: Recipe,
    ids: np.ndarray[Any, np.dtype[np.int32]],
    *,
    ignored: Collection[str],
    device: torch.device,
    journal: Journal,
    reporter: Reporter,
) -> None:
    """Round each decoder layer's linears and leave them packed, under their new names, in the journal.

    Args:
        checkpoint: the bf16 source.
        recipe: how to round.
        ids: int32 [windows, tokens], each window beginning with <bos>.
        ignored: module names that stay in bf16.
        device: where the layer runs.
        journal: takes each finished layer; those it holds already are not computed again.
        reporter: shows progress.
    """
    scheme = quantization_scheme(recipe)
    decoder = Decoder(checkpoint, device)
    stream = _HiddenStates(decoder, ids)
    layers = decoder_linears(checkpoint.config, decoder.prefix)
    with reporter.progress("quantize layers", len(layers)) as task:
        for index, all_groups in enumerate(layers):
            layer = decoder.load_layer(index)
            start = f"{decoder.prefix}layers.{index}."
            groups = [group for group in all_groups if group[0] not in ignored]
            linears: dict[str, Any] = {
                name: layer.get_submodule(name.removeprefix(start)) for group in groups for name in group
            }
            tensors = journal.load(f"layer-{index:03}")
            if tensors is None:
                statistics = stream.observe(index, layer, [linears[group[0]] for group in groups])
                tensors = {}
                for group, seen in zip(groups, statistics, strict=True):
                    weights = [linears[name].weight.data for name in group]
                    rounded = round_group(weights, scheme.weights, seen, recipe)
                    activations = scheme.input_activations
                    static = activations is not None and activations.dynamic in (False, "local")
                    input_scale = seen.scale(activations) if static else None
                    for name, linear in zip(group, rounded, strict=True):
                        tensors |= pack(name, replace(linear, input_scale=input_scale), scheme)
                journal.save(f"layer-{index:03}", tensors)
            for name, module in linears.items():
                module.weight.data.copy_(unpack(name, tensors, scheme))
            if index + 1 < len(layers):
                stream.advance(index, layer)
            task.advance()


class _HiddenStates:
    """The hidden states of all calibration windows, on the CPU, as they travel through the decoder."""

    def __init__(self, decoder: Decoder, ids: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        self.decoder = decoder
        self.batch = max(1, _TOKENS_A_BATCH // ids.shape[1])
        self.states = decoder.embed(ids, self.batch)
        self.arguments: dict[int, dict[str, dict[str, Any]]] = {}

    def observe(self, index: int, layer: nn.Module, heads: list[Any]) -> list[InputStatistics]:
        """Return the statistics of the input of each of `heads`, linears of the layer; the states stay as they are."""
        statistics = [InputStatistics(head.weight.shape[1], self.decoder.device) for head in heads]

        def adder(seen: InputStatistics) -> Any:  # noqa: ANN401 - the type of a torch hook
            return lambda _module, inputs: seen.add(inputs[0])

        hooks = [head.register_forward_pre_hook(adder(seen)) for head, seen in zip(heads, statistics, strict=True)]
        try:
            for _ in self._outputs(index, layer):
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return statistics

    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the states by what layer `index` makes of them."""
        begin = 0
        for output in self._outputs(index, layer):
            self.states[begin : begin + len(output)] = output.cpu()
            begin += len(output)

    @torch.no_grad()
    def _outputs(self, index: int, layer: nn.Module) -> Iterator[Tensor]:
        for states in torch.split(self.states, self.batch):
            windows, tokens, _ = states.shape
            if windows not in self.arguments:
                self.arguments[windows] = self.decoder.layer_arguments(windows, tokens)
            yield layer(states.to(self.decoder.device), **self.arguments[windows][self.decoder.kinds[index]])
