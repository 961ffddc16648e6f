"""The weight audit: sound rounding of every scheme passes, and planted damage is found and named."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch

from bench import damages
from gemma_pack.audit_results import ModuleAudit
from gemma_pack.build import CalibrationChoice, quantize_model
from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import CheckpointError
from gemma_pack.evaluation import audit as auditing
from gemma_pack.evaluation.audit import audit_weights
from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.record import require_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.audit_results import WeightAudit
    from gemma_pack.console import Console

    Tensors = dict[str, torch.Tensor]

LAYER = "model.layers.1"
LINEARS = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
RECIPE = """\
name: tiny-{name}
summary: for tests
scheme: {scheme}
algorithm: {algorithm}
{more}
gate: [{{kl_nats: 1}}]
"""
CALIBRATION = "calibration: {dataset: builtin, samples: 8, sequence_length: 64, seed: 1}"
SCHEMES = {
    "w4a16": ("W4A16", "nearest", "group_size: 32"),
    "w4a16-gptq": ("W4A16", "gptq", "group_size: 32\n" + CALIBRATION),
    "w8a16": ("W8A16", "nearest", ""),
    "w8a8": ("W8A8", "nearest", ""),
    "fp8": ("FP8", "nearest", CALIBRATION),
    "fp8-dynamic": ("FP8_DYNAMIC", "nearest", ""),
    "nvfp4": ("NVFP4", "nearest", CALIBRATION),
}


@pytest.fixture(scope="session")
def variants(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a variant of `trained` by its name in SCHEMES; copy it before changing it."""
    from gemma_pack.console import Console

    base = tmp_path_factory.mktemp("variants")

    def find(name: str) -> Path:
        directory = base / name
        if not directory.is_dir():
            scheme, algorithm, more = SCHEMES[name]
            recipe = base / f"{name}.yaml"
            recipe.write_text(RECIPE.format(name=name, scheme=scheme, algorithm=algorithm, more=more))
            quantize_model(
                str(trained), str(recipe), directory, CalibrationChoice(), device="cpu", reporter=Console("quiet")
            )
        return directory

    return find


@pytest.fixture
def audit(trained: Path, reporter: Console) -> Callable[[Path], WeightAudit]:
    def run(variant: Path) -> WeightAudit:
        record = require_record(variant).quantization
        assert record is not None
        found = audit_weights(
            Checkpoint.open(trained), Checkpoint.open(variant), record, device="cpu", reporter=reporter
        )
        assert found is not None
        return found

    return run


def damaged(audit: WeightAudit) -> list[str]:
    return [module.name for module in audit.modules if module.problem]


@pytest.mark.parametrize("name", SCHEMES)
def test_sound_rounding_passes(
    variants: Callable[[str], Path], audit: Callable[[Path], WeightAudit], name: str
) -> None:
    found = audit(variants(name))
    assert found.scheme == SCHEMES[name][0]
    assert [module.problem for module in found.modules if module.problem] == []
    assert found.altered == ()
    assert len(found.modules) == 3 * 7


@pytest.mark.parametrize("name", SCHEMES)
def test_figures_are_the_formulas(
    variants: Callable[[str], Path], audit: Callable[[Path], WeightAudit], trained: Path, name: str
) -> None:
    from safetensors.torch import load_file

    name_of_layer = f"{LAYER}.mlp.down_proj"
    model = load(variants(name), "variant", "cpu").module
    rounded = model.get_submodule(name_of_layer).weight.detach().double()
    source = load_file(trained / "model.safetensors")[f"{name_of_layer}.weight"].double()
    [module] = [module for module in audit(variants(name)).modules if module.name == name_of_layer]
    assert module.slope == pytest.approx(float((source * rounded).sum() / (source * source).sum()), abs=2e-4)
    error = float(((source - rounded) ** 2).sum() / (source**2).sum())
    assert module.snr_db == pytest.approx(-10 * torch.tensor(error).log10().item(), abs=0.05)
    width = {"w4a16": 32, "w4a16-gptq": 32, "nvfp4": 16, "w8a16": 128}.get(name, source.shape[1])
    groups = ((source - rounded) ** 2).view(len(source), -1, width).sum(-1) / (source**2).view(
        len(source), -1, width
    ).sum(-1)
    assert module.worst_group_snr_db == pytest.approx(-10 * groups.max().log10().item(), abs=0.05)
    assert (module.worst_row, module.worst_column // width) == divmod(int(groups.argmax()), groups.shape[1])


@pytest.mark.parametrize("name", ["w4a16", "w4a16-gptq", "w8a16", "fp8-dynamic", "nvfp4"])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_scales_of_one_module_off_by_3_percent_are_found(
    variants: Callable[[str], Path], audit: Callable[[Path], WeightAudit], tmp_path: Path, name: str, factor: float
) -> None:
    layer = f"{LAYER}.self_attn.k_proj"

    def harm(tensors: Tensors) -> None:
        if name == "nvfp4":  # its own scales are too coarse for 3 %
            tensors[f"{layer}.weight_global_scale"] /= factor
        else:
            damages.rescale(tensors, layer, factor)

    found = audit(damages.damaged_copy(variants(name), tmp_path / "harmed", harm))
    assert damaged(found) == [layer]
    [problem] = [module.problem for module in found.modules if module.problem]
    assert problem.startswith("slope ")


@pytest.mark.parametrize("name", ["w4a16-gptq", "w8a16", "fp8-dynamic"])
@pytest.mark.parametrize("damage", ["heads", "modules", "groups"])
def test_what_lies_in_a_wrong_place_is_found_and_named(
    variants: Callable[[str], Path], audit: Callable[[Path], WeightAudit], tmp_path: Path, name: str, damage: str
) -> None:
    query, gate, up = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"

    def harm(tensors: Tensors) -> None:
        if damage == "heads":
            damages.swap_heads(tensors, query, head_dim=64)
        elif damage == "modules":
            damages.exchange(tensors, gate, up)
        else:
            damages.shift_groups(tensors, f"{LAYER}.")

    found = damaged(audit(damages.damaged_copy(variants(name), tmp_path / "harmed", harm)))
    if damage == "groups":
        assert set(found) <= {f"{LAYER}.{linear}" for linear in LINEARS}
        assert len(found) >= 4  # rows of a tiny layer are so alike that two neighbours' scales can be as well
    else:
        assert found == ([query] if damage == "heads" else [gate, up])


def test_one_wrong_group_among_thousands_is_found(
    variants: Callable[[str], Path], audit: Callable[[Path], WeightAudit], tmp_path: Path
) -> None:
    layer = f"{LAYER}.mlp.down_proj"

    def harm(tensors: Tensors) -> None:
        tensors[f"{layer}.weight_scale"][77, 3] *= 3

    found = audit(damages.damaged_copy(variants("w4a16"), tmp_path / "harmed", harm))
    [module] = [module for module in found.modules if module.problem]
    assert (module.name, module.worst_row, module.worst_column) == (layer, 77, 96)
    assert "the group at row 77, column 96" in str(module.problem)


def test_rounded_norms_are_altered_tensors(
    variants: Callable[[str], Path], audit: Callable[[Path], WeightAudit], tmp_path: Path
) -> None:
    found = audit(damages.damaged_copy(variants("w8a16"), tmp_path / "harmed", damages.round_norms))
    assert damaged(found) == []
    assert f"{LAYER}.input_layernorm.weight" in found.altered
    assert all(name.endswith("norm.weight") for name in found.altered)


@pytest.mark.parametrize("factor", [0.97, 1.0, 1.03])
@pytest.mark.parametrize("damaged", [0, 9, 17])
def test_one_layer_off_is_told_from_layers_whose_slope_falls_with_their_noise(factor: float, damaged: int) -> None:
    """The line need not begin at 1, nor the share be one for all; one layer of 18 does not bend it."""
    modules = []
    for layer in range(18):
        noise = 0.016 + 0.002 * layer
        slope = 0.993 - 0.2 * noise
        if layer == damaged:
            # ‖W - fŴ‖² / ‖W‖² by what it was for f = 1
            noise, slope = 1 - 2 * factor * slope + factor**2 * (noise - 1 + 2 * slope), slope * factor
        modules.append(
            ModuleAudit(
                name=f"model.layers.{layer}.self_attn.k_proj", slope=slope, expected_slope=0,
                snr_db=-10 * math.log10(noise), worst_group_snr_db=0, worst_row=0, worst_column=0,
            )
        )  # fmt: skip
    off = [abs(module.slope - module.expected_slope) for module in auditing._expect(modules)[1]]
    assert off[damaged] == pytest.approx(abs(factor - 1), abs=0.003)
    assert max(off[:damaged] + off[damaged + 1 :]) < 0.003


def test_blocks_do_not_change_the_figures(
    variants: Callable[[str], Path], audit: Callable[[Path], WeightAudit], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = audit(variants("w4a16"))
    monkeypatch.setattr(auditing, "BLOCK_WEIGHTS", 1000)
    in_pieces = audit(variants("w4a16"))
    for one, other in zip(whole.modules, in_pieces.modules, strict=True):
        assert one.snr_db == pytest.approx(other.snr_db, abs=1e-4)
        assert (one.worst_row, one.worst_column) == (other.worst_row, other.worst_column)


def test_a_config_that_names_no_scheme_is_refused(
    variants: Callable[[str], Path], audit: Callable[[Path], WeightAudit], tmp_path: Path
) -> None:
    copy = damages.damaged_copy(variants("w8a16"), tmp_path / "copy", dict.copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not say by one scheme"):
        audit(copy)
