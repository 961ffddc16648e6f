"""Products of bfloat16 matrices in float32 pieces, as on a processor without instructions for them."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from gemma_pack import bfloat16
from gemma_pack.bfloat16 import Float32Linear, multiply_in_float32, product
from gemma_pack.checkpoint import Checkpoint
from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.quantization.tuned_model import load_untuned
from tests.tiny import write_tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tests.tiny import Family


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "is_emulated", lambda: True)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut so that every test matrix has several pieces, the last of them smaller."""
    monkeypatch.setattr(bfloat16, "is_emulated", lambda: True)
    for name, value in {"PIECE_VALUES": 700, "ROWS_AT_ONCE": 16, "COLUMNS_AT_ONCE": 30}.items():
        monkeypatch.setattr(bfloat16, name, value)


def matrix(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def rounded_once(left: Tensor, right: Tensor) -> Tensor:
    return (left.double() @ right.double()).bfloat16()


SHAPES = {"more columns": (50, 40, 101), "more terms": (50, 101, 40), "batches": (3, 17, 40, 101)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("small_pieces")
def test_product_is_rounded_once(shape: tuple[int, ...]) -> None:
    *rows, inner, columns = shape
    left, right = matrix(*rows, inner), matrix(columns, inner).T
    made, wanted = product(left, right), rounded_once(left, right)
    assert made.dtype == torch.bfloat16
    assert made.shape == wanted.shape
    assert (made == wanted).double().mean() > 0.99  # a sum at the border of two bf16 numbers may fall to either side
    torch.testing.assert_close(made, wanted, rtol=2**-7, atol=1e-4)


@pytest.mark.usefixtures("small_pieces")
def test_product_goes_where_it_is_told() -> None:
    left, right, room = matrix(50, 40), matrix(40, 101), torch.empty(50 * 101, dtype=torch.bfloat16)
    made = product(left, right, out=room.view(50, 101))
    assert made.data_ptr() == room.data_ptr()
    assert torch.equal(made, product(left, right))


@pytest.mark.parametrize("rows", [1, 4, 5, 60])
@pytest.mark.usefixtures("small_pieces")
def test_few_rows_and_many_agree(rows: int) -> None:
    left, right = matrix(rows, 40), matrix(101, 40).T
    torch.testing.assert_close(product(left, right), rounded_once(left, right), rtol=2**-7, atol=1e-4)


@pytest.mark.usefixtures("small_pieces")
def test_gradient_is_that_of_a_product() -> None:
    left, right, gradient = matrix(2, 30, 40).requires_grad_(), matrix(101, 40).T, matrix(2, 30, 101)
    product(left, right).backward(gradient)
    assert left.grad is not None
    torch.testing.assert_close(left.grad, rounded_once(gradient, right.T), rtol=2**-7, atol=1e-4)


@pytest.mark.usefixtures("without_instructions")
def test_float32_stays_with_torch() -> None:
    left, right = matrix(50, 40).float(), matrix(40, 101).float()
    assert torch.equal(product(left, right), left @ right)


@pytest.mark.usefixtures("without_instructions")
def test_layers_with_a_way_of_their_own_keep_it() -> None:
    class Own(torch.nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            return states[..., :1] * 2

    module = torch.nn.Sequential(torch.nn.Linear(40, 101), Own(101, 7)).bfloat16()
    multiply_in_float32(module)
    states = matrix(50, 40)
    first = module[0](states)
    wanted = rounded_once(states, module[0].weight.T) + module[0].bias
    torch.testing.assert_close(first, wanted, rtol=2**-6, atol=1e-2)
    assert torch.equal(module(states), first[..., :1] * 2)


def test_model_says_the_same_either_way(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    found = []
    for emulated in (False, True):
        monkeypatch.setattr(bfloat16, "is_emulated", lambda emulated=emulated: emulated)
        model = load(tiny_checkpoint, "base", "cpu")
        with torch.no_grad():
            hidden = model.hidden(torch.arange(2, 42).view(2, 20))
            found.append(model.logits(hidden.flatten(0, 1)))
        changed = [m for m in model.module.modules() if isinstance(m, Float32Linear)]
        assert bool(changed) == emulated
    native, ours = found
    assert (native - ours).abs().mean() < 0.01 * native.abs().mean()


@pytest.mark.parametrize(
    ("family", "function"), [("gemma3_text", "scaled_dot_product_attention"), ("gemma2", "softmax")]
)
def test_attention_is_as_near_to_float32_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: Family, function: str
) -> None:
    checkpoint = Checkpoint.open(write_tiny(tmp_path / "gemma", family))
    attend, computed_in, found = getattr(torch.nn.functional, function), [], []
    monkeypatch.setattr(
        torch.nn.functional,
        function,
        lambda states, *others, **settings: computed_in.append(states.dtype) or attend(states, *others, **settings),
    )
    for emulated, dtype in ((False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)):
        monkeypatch.setattr(bfloat16, "is_emulated", lambda emulated=emulated: emulated)
        decoder = load_untuned(checkpoint, torch.device("cpu"), streamed=False).get_decoder().to(dtype)
        inputs = matrix(2, 30, decoder.config.hidden_size).to(dtype).requires_grad_()
        hidden = decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
        hidden.backward(matrix(*hidden.shape).to(dtype))
        assert inputs.grad is not None
        assert inputs.grad.dtype == hidden.dtype == dtype
        found.append((hidden.detach().float(), inputs.grad.float()))
    layers = decoder.config.num_hidden_layers
    assert computed_in == [torch.float32] * layers + [torch.bfloat16] * layers + [torch.float32] * layers
    for exact, native, ours in zip(*found, strict=True):
        apart = [float((other - exact).norm() / exact.norm()) for other in (native, ours)]
        assert apart[1] < 1.1 * apart[0] < 0.1, apart


def test_another_kernel_is_attended_with_and_put_back(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    monkeypatch.setattr(bfloat16, "is_emulated", lambda: True)
    model = load(tiny_checkpoint, "base", "cpu")
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        usual = model.hidden(ids)
        with model.attending("eager"):
            other = model.hidden(ids)
        again = model.hidden(ids)
    assert model.attention == "sdpa"
    assert torch.equal(usual, again)
    assert not torch.equal(usual, other)
    assert (usual - other).abs().mean() < 0.02 * usual.abs().mean()


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
@pytest.mark.usefixtures("without_instructions")
def test_every_layer_of_a_variant_multiplies_here(
    monkeypatch: pytest.MonkeyPatch, tiny_variants: Callable[[str], Path], scheme: str
) -> None:
    """compressed-tensors puts a forward of its own on layers, which calls that of their class."""
    model = load(tiny_variants(scheme), "variant", "cpu")
    ids, inner = torch.arange(2, 42).view(2, 20), []
    monkeypatch.setattr(bfloat16, "_in_pieces", lambda left, right, _: inner.append(len(right)) or left @ right)
    with torch.no_grad():
        model.hidden(ids)
    assert len(inner) == 7 * model.module.config.num_hidden_layers


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
def test_is_emulated_without_instructions_alone() -> None:
    flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    used = {"avx512bw", "avx512vl", "avx512dq"} <= flags and bool(flags & {"avx512_bf16", "amx_tile"})
    assert bfloat16.is_emulated() == (not used)
