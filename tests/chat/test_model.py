"""The model that speaks, on tiny checkpoints: every preset and precision, the cache, packed weights, refusals."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from gemma_pack.chat.model import SpokenModel
from gemma_pack.chat.packed import Int4Linear, UnpackedEachTime
from gemma_pack.chat.presets import choose, measure_weights
from gemma_pack.chat.sampling import GREEDY, Sampling
from gemma_pack.checkpoint import Checkpoint
from gemma_pack.console import Console
from gemma_pack.errors import CheckpointError, InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDS = [2, 300, 301, 302, 303]


def speaker(directory: Path, preset: str | None = None, precision: str | None = None, *, seed: int = 0) -> SpokenModel:
    checkpoint = Checkpoint.open(directory)
    plan = choose(measure_weights(checkpoint), preset, precision, "cpu", None)  # type: ignore[arg-type]
    model = SpokenModel(checkpoint, plan, context=256, seed=seed, reporter=Console("quiet"))
    model.ends = frozenset()
    return model


def logits(model: SpokenModel) -> torch.Tensor:
    model.forget()
    return model._feed(IDS, model._logits)


def similar(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))


@pytest.mark.parametrize(
    ("preset", "precision", "least"),
    [
        ("exact", "float32", 0.999),
        ("memory", "int8", 0.99),
        ("memory", "nf4", 0.9),
        ("memory-extreme", "bfloat16", 1 - 1e-6),
    ],
)
def test_every_precision_says_nearly_what_bfloat16_says(
    tiny_checkpoint: Path, preset: str, precision: str, least: float
) -> None:
    exact = logits(speaker(tiny_checkpoint))
    found = logits(speaker(tiny_checkpoint, preset, precision))
    assert similar(found, exact) >= least
    assert found.dtype == torch.float32


def test_precisions_are_what_they_say(tiny_checkpoint: Path) -> None:
    kinds = {
        name: type(speaker(tiny_checkpoint, None, name)._module.model.layers[0].mlp.up_proj).__name__
        for name in ("float32", "int8", "nf4")
    }
    assert kinds == {"float32": "Linear", "int8": "Linear8bitLt", "nf4": "Linear4bit"}
    weight = speaker(tiny_checkpoint, None, "nf4")._module.model.layers[0].mlp.up_proj.weight
    assert (weight.quant_type, weight.quant_state.nested) == ("nf4", True)
    assert speaker(tiny_checkpoint, None, "float32")._module.dtype == torch.float32


def test_memory_extreme_leaves_the_layers_on_the_disk(tiny_checkpoint: Path) -> None:
    module = speaker(tiny_checkpoint, "memory-extreme")._module
    assert {parameter.device.type for parameter in module.model.layers.parameters()} == {"meta"}
    assert module.model.embed_tokens.weight.device.type == "cpu"


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3"])
def test_a_conversation_is_not_read_again_and_nothing_changes_by_it(
    tiny_checkpoints: Callable[[Any], Path], family: str
) -> None:
    # more than two windows of 32 tokens
    model = speaker(tiny_checkpoints(family), None, "float32")
    said = list(model.stream(IDS, GREEDY, 60))
    longer = [*IDS, *said, 310, 311, 312]
    fed: list[int] = []
    feed = model._feed
    model._feed = lambda ids, step: (fed.append(len(ids)), feed(ids, step))[1]  # type: ignore[method-assign]
    kept = list(model.stream(longer, GREEDY, 20))
    assert fed[0] == len(longer) - len(IDS) - 59  # the last token that was said had not been read
    model.forget()
    assert list(model.stream(longer, GREEDY, 20)) == kept
    assert fed[20] == len(longer)


def test_what_was_interrupted_is_read_again(tiny_checkpoint: Path) -> None:
    model = speaker(tiny_checkpoint, None, "float32")
    expected = list(model.stream(IDS, GREEDY, 10))
    right = model._logits

    def interrupted(ids: torch.Tensor) -> torch.Tensor:
        right(ids)
        raise KeyboardInterrupt

    model.forget()
    model._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(model.stream(IDS, GREEDY, 10))
    model._step = right
    assert list(model.stream(IDS, GREEDY, 10)) == expected


def test_a_seed_says_the_same_again(tiny_checkpoint: Path) -> None:
    free = Sampling(temperature=2)
    first, again, other = (list(speaker(tiny_checkpoint, seed=n).stream(IDS, free, 12)) for n in (7, 7, 8))
    assert first == again
    assert first != other


def test_an_end_token_ends_and_a_full_context_is_refused(tiny_checkpoint: Path) -> None:
    model = speaker(tiny_checkpoint)
    [first] = model.stream(IDS, GREEDY, 1)
    model.ends = frozenset({first})
    assert list(model.stream(IDS, GREEDY, 50)) == [first]
    model.ends = frozenset()
    assert len(list(model.stream(IDS * 51, GREEDY, 50))) == 1  # 255 of 256
    with pytest.raises(InvalidUsageError, match="256 tokens do not fit into a context of 256"):
        list(model.stream([*IDS * 51, 2], GREEDY, 50))


def test_the_ends_are_those_of_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 6]}', "utf-8")
    checkpoint = Checkpoint.open(directory)
    plan = choose(measure_weights(checkpoint), None, None, "cpu", None)
    model = SpokenModel(checkpoint, plan, context=64, seed=0, reporter=Console("quiet"))
    assert model.ends == {1, 6}


def test_damaged_weights_are_said(tiny_checkpoint: Path) -> None:
    model = speaker(tiny_checkpoint)
    model._module.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="computes NaN or infinity"):
        list(model.stream(IDS, GREEDY, 2))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_int4_kernel_multiplies_what_the_codes_say(group_size: int, tokens: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (48, 256), dtype=torch.int8)
    scale = (torch.rand(48, 256 // group_size) + 0.1).bfloat16()
    states = torch.randn(2, tokens, 256).bfloat16()
    weight = codes.double() * scale.double().repeat_interleave(group_size, 1)
    exact = states.double() @ weight.T
    found = Int4Linear(codes, scale, group_size)(states).double()
    assert found.shape == exact.shape
    assert float((found - exact).abs().max() / exact.abs().max()) < 0.01


@pytest.mark.parametrize(
    ("scheme", "kept"), [("W4A16", Int4Linear), ("W8A16", UnpackedEachTime), ("W8A8", UnpackedEachTime)]
)
def test_a_packed_variant_says_what_the_unpacked_one_says(
    tiny_variants: Callable[[str], Path], scheme: str, kept: type
) -> None:
    directory = tiny_variants(scheme)
    packed, unpacked = speaker(directory, "memory"), speaker(directory, "exact")
    assert type(packed._module.model.layers[0].mlp.up_proj) is kept
    assert type(unpacked._module.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert similar(logits(packed), logits(unpacked)) > 0.999
    assert logits(speaker(directory, "exact", "float32")).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # inductor calls what torch deprecates
@pytest.mark.real
def test_speed_really_compiles_and_says_the_same(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torch._dynamo.utils import counters

    checkpoint = Checkpoint.open(tiny_checkpoint)
    plan = choose(measure_weights(checkpoint), "speed", "float32", "cpu", None)
    model = SpokenModel(checkpoint, plan, context=128, seed=0, reporter=Console())
    model.ends = frozenset()
    announced = capsys.readouterr().err.splitlines()
    assert announced == ["warm-up 1 of 2: compiling, which takes minutes", "warm-up 2 of 2"]
    assert model.compiled_graphs == 1
    compiled = counters["stats"]["unique_graphs"]
    said = list(model.stream(IDS, GREEDY, 60))
    assert said == list(speaker(tiny_checkpoint, "exact", "float32").stream(IDS, GREEDY, 60))
    longer = [*IDS, *said, 310, 311]
    kept = list(model.stream(longer, GREEDY, 20))
    model.forget()
    assert list(model.stream(longer, GREEDY, 20)) == kept
    assert counters["stats"]["unique_graphs"] == compiled  # nothing was compiled again
    assert not counters["graph_break"]
