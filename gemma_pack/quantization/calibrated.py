"""The calibrated path: decoder layer by decoder layer.

The windows run through the bf16 layers once, as the base computes them; on the way each distinct input of a layer
leaves its statistics, and from these every recipe of the run rounds that layer. Only one layer's weights and the
windows' hidden states are in memory, the second on disk where they are many.

Layers do not see each other's rounding. On Gemma 3 270M that costs nothing that can be measured (KL after
GPTQ 0.167 either way, mean of two texts), and it makes layers and recipes independent: one forward pass
for all of them, whichever are made in one run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from gemma_pack.gemma import decoder_linears, decoder_prefix
from gemma_pack.quantization.decoder import Decoder
from gemma_pack.quantization.equivalence import Equivalence
from gemma_pack.quantization.packing import pack
from gemma_pack.quantization.rounding import InputStatistics, round_group
from gemma_pack.quantization.scheme import quantization_scheme
from gemma_pack.quantization.transforms import Smoothed, feeder_of, norm_of, smooth, smoothed_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Reporter
    from gemma_pack.quantization.journal import Journal
    from gemma_pack.quantization.ranks import Ranks
    from gemma_pack.recipe import Recipe

_TOKENS_A_BATCH = 4096
"""Tokens in one forward call: enough to keep two cores or a GPU busy, few enough for 2 GB of memory."""
EQUIVALENCE = "equivalence"
"""The journal's entry with the KL that smoothing left."""
MAX_STATES_IN_MEMORY_BYTES = 8_000_000_000
"""Hidden states beyond this lie in a file: 512 x 2048 tokens of a 9B are 7.5 GB, of a 27B 9.7 GB."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A variant in the making: its recipe, the layers that it leaves alone, and where its rounded layers go."""

    recipe: Recipe
    ignored: frozenset[str]
    journal: Journal

    def missing(self, index: int, groups: Sequence[Sequence[str]]) -> list[int]:
        """Return which groups of decoder layer `index` the journal does not hold yet."""
        return [
            number
            for number, group in enumerate(groups)
            if group[0] not in self.ignored and not self.journal.holds(entry(index, number))
        ]

    def last_missing(self, layers: Sequence[Sequence[Sequence[str]]]) -> int:
        """Return the last layer that must still be run, -1 for none."""
        if self.unproved:
            return len(layers) - 1
        return max((index for index, groups in enumerate(layers) if self.missing(index, groups)), default=-1)

    @property
    def unproved(self) -> bool:
        """Whether the recipe smooths, and it is not yet proved that this changed nothing."""
        return self.recipe.smoothing is not None and not self.journal.holds(EQUIVALENCE)


def entry(index: int, number: int) -> str:
    """Return the journal's name for a group of a layer, in the order of the layers."""
    return f"layer-{index:03}-{number}"


def quantize_layers(
    checkpoint: Checkpoint,
    drafts: Sequence[Draft],
    ids: np.ndarray[Any, np.dtype[np.int32]],
    *,
    device: torch.device,
    ranks: Ranks,
    reporter: Reporter,
) -> None:
    """Round each decoder layer's linears for every draft and leave them packed, under their new names, in its journal.

    Args:
        checkpoint: the bf16 source.
        drafts: what is made of it; groups that their journals hold already are not computed again.
        ids: int32 [windows, tokens], each window beginning with <bos>; each process takes its share.
        device: where the layer runs.
        ranks: the processes that share the work.
        reporter: shows progress.

    Raises:
        QuantizationError: activations are not finite, a Hessian cannot be factorized, or smoothing changed a layer.
    """
    layers = decoder_linears(checkpoint.config, decoder_prefix(checkpoint.tensors))
    last = max((draft.last_missing(layers) for draft in drafts), default=-1)
    if last < 0:
        return
    decoder = Decoder(checkpoint, device)
    proofs = [Equivalence(checkpoint, ids, device) if draft.unproved else None for draft in drafts]
    with (
        HiddenStates(decoder, ranks.share(ids), drafts[0].journal.directory, ranks) as stream,
        reporter.progress("quantize layers", len(layers)) as task,
    ):
        for index, groups in enumerate(layers[: last + 1]):
            needed = any(draft.missing(index, groups) for draft in drafts)
            statistics = stream.advance(index, groups if needed else [])
            tensors = {name: tensor.to(device) for name, tensor in decoder.tensors(index).items()} if needed else {}
            for draft, proof in zip(drafts, proofs, strict=True):
                smoothed = _smooth_layer(draft, index, groups, tensors, statistics)
                if proof:
                    proof.advance(index, groups, smoothed)
                for number in draft.missing(index, groups):
                    if ranks.takes(number):
                        weights = smoothed_weights(groups[number], tensors, groups, smoothed)
                        made = _round(draft.recipe, groups[number], weights, statistics[number], smoothed[number])
                        draft.journal.save(entry(index, number), made)
            task.advance()
        task.advance(len(layers) - last - 1)
    for draft, proof in zip(drafts, proofs, strict=True):
        if proof:
            draft.journal.save(EQUIVALENCE, {"kl_nats": torch.tensor(proof.kl_nats(), dtype=torch.float64)})
    ranks.wait()


def _smooth_layer(
    draft: Draft,
    index: int,
    groups: Sequence[Sequence[str]],
    tensors: Mapping[str, Tensor],
    statistics: Sequence[InputStatistics],
) -> list[Smoothed | None]:
    """Return how each group of a layer is smoothed: as the journal says, else by statistics, kept in the journal."""
    if draft.recipe.smoothing is None:
        return [None] * len(groups)
    name = f"smoothing-{index:03}"
    kept = draft.journal.load(name)
    if kept is None:
        kept = {}
        for number, (group, seen) in enumerate(zip(groups, statistics, strict=True)):
            names = {group[0], feeder_of(group) or group[0]}
            change = None if names & draft.ignored else smooth(group, tensors, seen, draft.recipe.smoothing.strength)
            if change is not None:
                kept[f"{number}.columns"] = change.columns.cpu()
            if change is not None and change.norm_weight is not None:
                kept[f"{number}.norm"] = change.norm_weight.cpu()
        draft.journal.save(name, kept)
    return [
        Smoothed(kept[f"{number}.columns"], norm_of(group), kept.get(f"{number}.norm"))
        if f"{number}.columns" in kept
        else None
        for number, group in enumerate(groups)
    ]


def _round(
    recipe: Recipe,
    group: Sequence[str],
    weights: list[Tensor],
    seen: InputStatistics,
    smoothed: Smoothed | None,
) -> dict[str, Tensor]:
    """Return the tensors that replace a group of linears and, where it was smoothed, the norm before them."""
    scheme = quantization_scheme(recipe)
    made: dict[str, Tensor] = {}
    if smoothed:
        seen = seen.divided(smoothed.columns.to(seen.total.device))
        if smoothed.norm and smoothed.norm_weight is not None:
            made[smoothed.norm] = smoothed.norm_weight
    rounded = round_group(weights, scheme.weights, seen, recipe)
    activations = scheme.input_activations
    static = activations is not None and activations.dynamic in (False, "local")
    input_scale = seen.scale(activations) if static else None
    for name, linear in zip(group, rounded, strict=True):
        made |= pack(name, replace(linear, input_scale=input_scale), scheme)
    return made


class HiddenStates:
    """The hidden states of calibration windows as they travel through the decoder: on the CPU, or in a file."""

    def __init__(
        self, decoder: Decoder, ids: np.ndarray[Any, np.dtype[np.int32]], directory: Path, ranks: Ranks
    ) -> None:
        """Embed int32 [windows, tokens]; states beyond `MAX_STATES_IN_MEMORY_BYTES` lie in a file in `directory`."""
        self.decoder, self.ranks = decoder, ranks
        self.batch = max(1, _TOKENS_A_BATCH // ids.shape[1])
        self.file = directory / f"states-{ranks.rank}"
        shape = (*ids.shape, decoder.width)
        if 2 * math.prod(shape) <= MAX_STATES_IN_MEMORY_BYTES:
            self.states = torch.empty(shape, dtype=torch.bfloat16)
        else:
            size = math.prod(shape)
            self.states = torch.from_file(str(self.file), shared=True, size=size, dtype=torch.bfloat16).view(shape)
        for begin in range(0, len(ids), self.batch):
            self.states[begin : begin + self.batch] = decoder.embed(ids[begin : begin + self.batch])
        self.arguments: dict[int, dict[str, dict[str, Any]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.unlink(missing_ok=True)

    @torch.no_grad()
    def advance(self, index: int, observed: Sequence[Sequence[str]]) -> list[InputStatistics]:
        """Replace the states by what layer `index` makes of them.

        Args:
            index: the layer, whose weights are loaded for it.
            observed: groups of linears that share an input, by module name.

        Returns:
            For each group the statistics of its input, over the windows of all processes.
        """
        layer = self.decoder.load_layer(index)
        linears: list[Any] = [layer.get_submodule(self.decoder.within_layer(group[0])) for group in observed]
        statistics = [InputStatistics(linear.in_features, self.decoder.device) for linear in linears]

        def adder(seen: InputStatistics) -> Any:  # noqa: ANN401 - the type of a torch hook
            return lambda _module, inputs: seen.add(inputs[0])

        hooks = [
            linear.register_forward_pre_hook(adder(seen)) for linear, seen in zip(linears, statistics, strict=True)
        ]
        try:
            for states in torch.split(self.states, self.batch):
                windows, tokens, _ = states.shape
                if windows not in self.arguments:
                    self.arguments[windows] = self.decoder.layer_arguments(windows, tokens)
                arguments = self.arguments[windows][self.decoder.kinds[index]]
                states.copy_(layer(states.to(self.decoder.device), **arguments))
        finally:
            for hook in hooks:
                hook.remove()
        for seen in statistics:
            seen.merge(self.ranks)
        return statistics
