"""The computing stages on a device that is imitated: no numbers, but shapes, dtypes and where each tensor lies.

    python -m tests.imitated_device

torch's own FakeTensor follows every operation and refuses one whose tensors lie on two devices, as CUDA does. Run in a
process of its own, for the imitated device stays registered. What reads numbers back gets made-up ones, and what
depends on them, packing, is stood in for.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.console import Console
from gemma_pack.quantization import calibrated, refinement, tuned_model
from gemma_pack.quantization.hidden_states import HiddenStates
from gemma_pack.quantization.ranks import Ranks
from gemma_pack.recipe import Recipe, Refinement, load_recipe
from tests.tiny import write_tiny

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from gemma_pack.quantization.packing import RoundedLinear

NAME = "imitated"
READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
)


class MadeUpNumbers(TorchDispatchMode):
    """What Python asks of a tensor's numbers: all is well, and differences are small."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            return 1e-6 if args[0].is_floating_point() else int(args[0].dtype == torch.bool)
        return func(*args, **(kwargs or {}))


class Entries:
    """A journal in memory, whose tensors must have come back to the CPU."""

    directory = Path(tempfile.gettempdir())

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Tensor]] = {}

    def holds(self, entry: str) -> bool:
        return entry in self.entries

    def load(self, entry: str) -> dict[str, Tensor] | None:
        return self.entries.get(entry)

    def save(self, entry: str, tensors: Mapping[str, Tensor]) -> None:
        assert {tensor.device.type for tensor in tensors.values()} <= {"cpu"}, entry
        self.entries[entry] = dict(tensors)

    def layers(self) -> list[Path]:
        return [Path(f"{entry}.safetensors") for entry in self.entries if entry.startswith("layer-")]


def pack(name: str, linear: RoundedLinear, _scheme: object) -> dict[str, Tensor]:
    tensors = {"weight_packed": linear.weight, "weight_scale": linear.scale, "input_scale": linear.input_scale}
    assert {tensor.device.type for tensor in tensors.values() if tensor is not None} == {NAME}, name
    return {f"{name}.{key}": tensor.cpu() for key, tensor in tensors.items() if tensor is not None}


def unpack_codes(name: str, tensors: Mapping[str, Tensor], _scheme: object) -> tuple[Tensor, Tensor]:
    return tensors[f"{name}.weight_packed"].to(torch.int8), tensors[f"{name}.weight_scale"]


def quantize(base: Path, recipe: Recipe, device: torch.device) -> list[str]:
    """Run the calibrated path and refinement; return the journal's entries."""
    ids = np.full((6, 64), 7, np.int32)
    checkpoint, journal = Checkpoint.open(base), Entries()
    drafts: Any = [calibrated.Draft(recipe, frozenset(), journal)]  # type: ignore[arg-type]
    quiet = Console("quiet")
    calibrated.quantize_layers(checkpoint, drafts, ids, device=device, ranks=Ranks(), reporter=quiet)
    if recipe.refinement:
        short = recipe.model_copy(update={"refinement": Refinement(steps=2, held_out=2)})
        refinement.refine_scales(checkpoint, short, ids, device=device, ranks=Ranks(), journal=journal, reporter=quiet)  # type: ignore[arg-type]
    return list(journal.entries)


def score(base: Path, device: torch.device) -> set[str]:
    """Score a window under two models; return where the measures lie."""
    from transformers import AutoModelForCausalLM

    from gemma_pack.evaluation.distributions import compare_states
    from gemma_pack.evaluation.engines.activations import E2M1, E4M3, INT8, ActivationScheme
    from gemma_pack.evaluation.engines.in_process import Model

    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device).eval()
    model, rows = Model(module, "base", "sdpa"), torch.full((2, 64), 7)
    states = model.hidden(rows)
    for scheme in (
        ActivationScheme(INT8), ActivationScheme(E4M3, group_size=32), ActivationScheme(E4M3, scale=0.1),
        ActivationScheme(E2M1, group_size=16, global_scale=3.0),
    ):  # fmt: skip
        assert scheme.round(states).device.type == NAME
    return {measure.device.type for measure in compare_states([states, states], model, model, rows)}


def main() -> None:
    """Run all, and say what was made."""
    _setup_privateuseone_for_python_backend(NAME)
    FakeTensorMode.avoid_device_init = property(lambda _: True)  # there is nothing to initialize
    calibrated.pack, tuned_model.unpack_codes = pack, unpack_codes
    HiddenStates.keep = HiddenStates._kept = lambda *_: []  # type: ignore[method-assign, assignment, return-value]
    device = torch.device(NAME, 0)
    with tempfile.TemporaryDirectory() as directory:
        soft_capped, with_tower = (write_tiny(Path(directory, family), family) for family in ("gemma2", "gemma4"))
        with FakeTensorMode(allow_non_fake_inputs=True), MadeUpNumbers():
            click.echo(" ".join(["refined", *quantize(soft_capped, load_recipe("w4a16"), device)]))
            click.echo(" ".join(["smoothed", *quantize(with_tower, load_recipe("w8a8"), device)]))
            with torch.no_grad():
                click.echo(" ".join(["scored", *score(soft_capped, device)]))


if __name__ == "__main__":
    main()
