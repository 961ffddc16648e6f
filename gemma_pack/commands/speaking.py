"""What `generate` and `chat` share: the options about model and preset, and the model that they open."""

from __future__ import annotations

import functools
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma_pack.chat.model import SpokenModel
    from gemma_pack.chat.presets import Device, Plan, Precision, Preset, Weights
    from gemma_pack.chat.sampling import Mode, Sampling
    from gemma_pack.chat.template import Language
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Console

F = TypeVar("F", bound="Callable[..., Any]")

CONTEXT = 4096
"""Tokens of a conversation unless told, or the model's own context where that is shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the user says about model and preset; None leaves it to the other options, the model or the machine."""

    model: str
    preset: Preset | None
    precision: Precision | None
    mode: Mode
    seed: int
    context: int | None
    device: str
    offline: bool


def speaking_options(command: F) -> F:
    """Give a command the options about how its argument `model` is loaded and drawn from, and pass all as `setup`.

    It stands above `with_console`, whose --quiet it turns on for --silent.
    """

    @click.option(
        "--preset",
        type=click.Choice(["auto", "exact", "speed", "memory", "memory-extreme"]),
        default="auto",
        show_default=True,
        help="How to load it, see above.",
    )
    @click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "int8", "nf4"]),
        help="What to compute in; int8 and nf4 by bitsandbytes  [default: the preset's]",
    )
    @click.option(
        "--mode",
        type=click.Choice(["chat", "factual", "creative"]),
        default="chat",
        show_default=True,
        help="Draw as generation_config.json says, take the likeliest token, or draw freely.",
    )
    @click.option("--seed", type=click.IntRange(min=0), help="The same seed gives the same answers  [default: random]")
    @click.option("--context", type=click.IntRange(min=16), help="Longest conversation in tokens  [default: 4096]")
    @click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where to compute.",
    )
    @click.option("--offline", is_flag=True, help="Use no network.")
    @click.option("--silent", is_flag=True, help="Print the answers only, as --quiet does.")
    @functools.wraps(command)
    def wrapper(*args: Any, silent: bool, quiet: bool, **kwargs: Any) -> Any:  # noqa: ANN401 - click's own
        given = {name: kwargs.pop(name) for name in Setup.__dataclass_fields__}
        given["preset"] = None if given["preset"] == "auto" else given["preset"]
        given["seed"] = secrets.randbelow(1 << 32) if given["seed"] is None else given["seed"]
        return command(*args, setup=Setup(**given), quiet=quiet or silent, **kwargs)

    return wrapper  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint with its tokenizer, before its weights are loaded."""

    checkpoint: Checkpoint
    weights: Weights
    language: Language
    sampling: Sampling


def open_checkpoint(setup: Setup, console: Console) -> Opened:
    """Find the model, which is fetched where it is not a directory, and read all of it but the weights."""
    from gemma_pack.chat.presets import measure_weights
    from gemma_pack.chat.sampling import sampling_of
    from gemma_pack.chat.template import Language
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.sources import obtain

    directory = Path(setup.model)
    if not directory.is_dir():
        directory = obtain(setup.model, revision=None, output=None, offline=setup.offline, reporter=console).directory
    checkpoint = Checkpoint.open(directory)
    weights = measure_weights(checkpoint)
    return Opened(checkpoint, weights, Language(directory), sampling_of(setup.mode, directory))


def make_plan(setup: Setup, opened: Opened, *, context: int, preset: Preset | None = None) -> Plan:
    """Return how to load the model here; `preset` takes the place of the user's."""
    from gemma_pack.build import resolve_device
    from gemma_pack.chat.presets import cache_bytes, choose

    device = cast("Device", resolve_device(setup.device))
    free = _free_bytes(device)
    left = None if free is None else free - cache_bytes(opened.checkpoint, context)
    return choose(opened.weights, preset or setup.preset, setup.precision, device, left)


def load(setup: Setup, opened: Opened, console: Console, *, context: int | None = None) -> SpokenModel:
    """Load the weights for conversations of `context` tokens, unless the user said how long they may be."""
    from gemma_pack.chat.model import SpokenModel
    from gemma_pack.gemma import decoder_number

    longest = decoder_number(opened.checkpoint.config, "max_position_embeddings")
    room = min(setup.context or context or CONTEXT, longest)
    plan = make_plan(setup, opened, context=room)
    console.status(f"loading {setup.model} on {plan.device}: preset {plan.preset}, {plan.precision}")
    return SpokenModel(opened.checkpoint, plan, context=room, seed=setup.seed, reporter=console)


def _free_bytes(device: str) -> int | None:
    if device == "cuda":
        from gemma_pack.gpu_memory import free_gpu_bytes

        return free_gpu_bytes()
    from gemma_pack.machine import available_memory

    return available_memory()
