"""The whole of a validation: what is refused, what is measured, what is written."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gemma_pack.build import validate_variant
from gemma_pack.errors import CheckpointError, InvalidUsageError, MachineError, QuantizationError, TextError
from gemma_pack.evaluation import likelihood, profiles, resident
from gemma_pack.evaluation.engines import in_process
from gemma_pack.evaluation.profiles import Profile
from gemma_pack.record import read_record
from gemma_pack.report import read_report
from tests.evaluation.conftest import noise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Console
    from gemma_pack.report import Report

FEW = Profile("few", windows=8, sequence_length=64, prompts=1, answer_tokens=4)
TINY = Profile("tiny", windows=40, sequence_length=64, prompts=3, answer_tokens=8)


@pytest.fixture(autouse=True)
def tiny_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(profiles.PROFILES, "tiny", TINY)


@pytest.fixture
def run_validation(trained: Path, tmp_path: Path, reporter: Console) -> Callable[..., Report]:
    def run(variant: Path, **options: Any) -> Report:
        settings = {"against": str(trained), "profile_name": "tiny", "text": "builtin", "device": "cpu"} | options
        return validate_variant(variant, tmp_path / "report", reporter=reporter, **settings)

    return run


def test_a_base_against_itself_passes_with_nothing_lost(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report]
) -> None:
    report = run_validation(make_variant())
    assert report.verdict == "pass"
    assert report.divergence.kl_nats.value < 1e-6
    assert report.likelihood.ln_ratio.value == 0
    assert report.divergence.same_top1.value == 1
    assert report.parity.identical_share == 1


@pytest.mark.parametrize(("harm", "verdict"), [(0.01, "pass"), (1.0, "fail")])
def test_harm_is_told_from_rounding(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], harm: float, verdict: str
) -> None:
    report = run_validation(make_variant(noise(harm)))
    assert report.verdict == verdict
    judged = {metric.name: metric.verdict for metric in report.metrics if metric.verdict != "not judged"}
    assert set(judged) == {"ppl_increase_percent", "kl_nats", "same_top1_percent", "empty_answers"}
    assert judged["kl_nats"] == verdict


def test_report_record_and_card_agree(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], tmp_path: Path
) -> None:
    variant = make_variant(noise(0.01))
    report = run_validation(variant)
    written = (tmp_path / "report" / "report.json").read_bytes()
    record = read_record(variant)
    assert record is not None
    assert record.validation is not None
    assert record.validation.report_sha256 == hashlib.sha256(written).hexdigest()
    assert record.validation.metrics == report.metrics
    assert record.validation.evaluation.windows == 40
    assert read_report(tmp_path / "report" / "report.json") == report
    card = (variant / "README.md").read_text()
    assert record.validation.report_sha256 in card
    assert "**PASS**" in card
    assert "PASS" in (tmp_path / "report" / "report.md").read_text()


def test_two_runs_write_the_same_bytes(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], tmp_path: Path
) -> None:
    variant = make_variant(noise(0.05))
    run_validation(variant)
    first = [path.read_bytes() for path in (tmp_path / "report" / "report.json", variant / "gemma-pack.json")]
    run_validation(variant)
    assert first == [path.read_bytes() for path in (tmp_path / "report" / "report.json", variant / "gemma-pack.json")]


def test_a_sharper_gate_can_be_named(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], tmp_path: Path
) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text((make_variant(name="model") / "recipe.yaml").read_text().replace("0.05", "0.0000001"))
    variant = make_variant(noise(0.05))
    assert run_validation(variant).verdict == "pass"
    assert run_validation(variant, recipe_name=str(strict)).verdict == "fail"


def test_too_few_windows_are_undecided_and_say_how_many_would_do(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(profiles.PROFILES, "few", FEW)
    report = run_validation(make_variant(noise(0.01)), profile_name="few")
    assert report.verdict == "undecided"
    assert report.windows_needed == 32


def test_one_window_is_too_few_for_anything(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("the weight of the model " * 16)
    with pytest.raises(TextError, match="fills one window"):
        run_validation(make_variant(), text=str(tmp_path / "short.txt"))


def test_a_variant_of_another_base_is_refused(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="a variant of another base"):
        run_validation(make_variant(), against=str(tiny_checkpoint))
    assert not (tmp_path / "report").exists()


def test_another_chat_template_is_refused(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report]
) -> None:
    variant = make_variant()
    (variant / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(CheckpointError, match="chat templates differ"):
        run_validation(variant)


def test_a_recipe_that_was_changed_afterwards_is_refused(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report]
) -> None:
    variant = make_variant()
    path = variant / "recipe.yaml"
    path.write_text(path.read_text().replace("scheme: W8A16", "scheme: W8A8"))
    with pytest.raises(CheckpointError, match="not the recipe that the variant was made by"):
        run_validation(variant)


def test_a_base_that_was_a_directory_must_be_named(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report]
) -> None:
    with pytest.raises(InvalidUsageError, match="a directory named trained") as caught:
        run_validation(make_variant(), against=None)
    assert "--against" in (caught.value.hint or "")


@pytest.mark.parametrize("missing", ["gemma-pack.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_variant_is_refused(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], missing: str
) -> None:
    variant = make_variant()
    (variant / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        run_validation(variant)


def test_a_truncated_variant_is_refused(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report]
) -> None:
    variant = make_variant()
    path = variant / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        run_validation(variant)


def test_a_base_checkpoint_is_no_variant(
    trained: Path, run_validation: Callable[..., Report], tmp_path: Path, make_variant: Callable[..., Path]
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    record = read_record(make_variant())
    assert record is not None
    record.model_copy(update={"quantization": None}).write(tmp_path / "copy")
    with pytest.raises(CheckpointError, match="is no variant"):
        run_validation(tmp_path / "copy")


def test_what_does_not_fit_into_memory_is_said_before_loading(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_process, "_free_bytes", lambda _: 500_000_000)
    with pytest.raises(MachineError, match=r"need 1\.00 GB on cpu, which has 500\.00 MB free") as caught:
        run_validation(make_variant())
    assert caught.value.exit_code == 12


def test_where_one_fits_and_two_do_not_the_figures_are_the_same(
    make_variant: Callable[..., Path],
    run_validation: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    variant = make_variant(noise(0.1))
    together = run_validation(variant)
    room = in_process.ROOM_BYTES + int(1.5 * together.base.size_bytes)
    monkeypatch.setattr(in_process, "_free_bytes", lambda _: room)
    apart = run_validation(variant)
    assert together.engine.spilled is None
    assert apart.engine.spilled is not None
    assert (apart.engine.spilled.kl_nats, apart.engine.spilled.nll_nats) == (0, 0)
    states_bytes = 40 * 64 * 128 * 2
    assert states_bytes < apart.engine.spilled.size_bytes < 1.1 * states_bytes
    same = ("windows", "likelihood", "divergence", "noise_floor", "protocol")
    assert [getattr(apart, name) for name in same] == [getattr(together, name) for name in same]
    assert apart.parity.identical_share == together.parity.identical_share
    assert apart.parity.divergent_share == pytest.approx(together.parity.divergent_share, abs=0.06)
    assert not (tmp_path / "report.partial").exists()


@pytest.mark.parametrize("module", ["model.layers.1.mlp.up_proj", "model.norm"])
def test_nan_in_a_base_that_makes_room_names_the_layer(trained: Path, tmp_path: Path, module: str) -> None:
    import torch

    from gemma_pack.evaluation.resident import SpilledBase

    model = in_process.load(trained, "base", "cpu")
    with torch.no_grad():
        model.module.get_submodule(module).weight.flatten()[3] = float("nan")
    with pytest.raises(QuantizationError, match=f"the base computes NaN or infinity, first in {module}"):
        SpilledBase(model, tmp_path / "states").keep(np.arange(24, dtype=np.int32).reshape(2, 12))


@pytest.mark.parametrize("fits", ["both", "one"])
def test_an_undecided_run_takes_more_windows_once(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, fits: str
) -> None:
    monkeypatch.setitem(profiles.PROFILES, "few", FEW)
    if fits == "one":
        monkeypatch.setattr(in_process, "_free_bytes", lambda _: in_process.ROOM_BYTES + 1_500_000)
    variant = make_variant(noise(0.01))
    read: list[int] = []
    monkeypatch.setattr(resident, "score", lambda b, v, ids, r: read.append(len(ids)) or likelihood.score(b, v, ids, r))
    report = run_validation(variant, profile_name="few", extend=True)
    assert report.verdict == "pass"
    assert report.windows_needed is None
    assert report.method.confidence == 0.975
    assert report.protocol.first_look_windows == 8
    assert (report.protocol.text.windows, len(report.windows), sum(read)) == (32, 32, 32)
    assert read == [8, 24]  # none twice
    whole = run_validation(variant, profile_name="few", extend=False, margins={})
    assert whole.verdict == "undecided"
    assert whole.method.confidence == 0.95


def test_a_text_without_more_windows_leaves_it_undecided(
    make_variant: Callable[..., Path],
    run_validation: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(profiles.PROFILES, "few", FEW)
    (tmp_path / "short.txt").write_text("the weight of the model is not in the layer " * 40)
    report = run_validation(
        make_variant(noise(0.01)), profile_name="few", text=str(tmp_path / "short.txt"), extend=True
    )
    assert report.verdict == "undecided"
    assert report.protocol.first_look_windows is None


def test_margins_can_be_given_and_the_report_says_so(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report]
) -> None:
    variant = make_variant(noise(0.05))
    report = run_validation(variant, margins={"kl_nats": 1e-7})
    assert report.verdict == "fail"
    assert report.gate is not None
    assert report.gate.margins == {"ppl_increase_percent": 3, "kl_nats": 1e-7, "same_top1_percent": 90}
    assert report.gate.overridden == ("kl_nats",)
    with pytest.raises(InvalidUsageError, match="no measure named speed") as caught:
        run_validation(variant, margins={"speed": 1})
    assert "ppl_increase_percent" in (caught.value.hint or "")
    with pytest.raises(InvalidUsageError, match="kl_nats cannot be -1"):
        run_validation(variant, margins={"kl_nats": -1})


def test_the_papers_perplexity_is_reported_and_not_judged(
    make_variant: Callable[..., Path], run_validation: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [" the weight of the model is not in the layer", "", " by the scale of this block"] * 40
    monkeypatch.setattr("gemma_pack.wikitext2.read_wikitext2", lambda **_: lines)
    monkeypatch.setattr("gemma_pack.texts.GPTQ_TOKENS", 128)
    variant = make_variant(noise(0.3))
    plain, both = run_validation(variant), run_validation(variant, gptq_protocol=True)
    assert both.other_protocols is not None
    [found] = both.other_protocols
    assert (found.name, found.text.sequence_length) == ("wikitext2-gptq", 128)
    assert found.tokens == found.text.windows * 127
    assert found.ppl_variant / found.ppl_base == pytest.approx(math.exp(found.ln_ratio.value))
    assert both.metrics == plain.metrics
    assert both.verdict == plain.verdict


def test_float16_is_refused(make_variant: Callable[..., Path], run_validation: Callable[..., Report]) -> None:
    variant = make_variant()
    config = json.loads((variant / "config.json").read_text())
    (variant / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    with pytest.raises(CheckpointError, match="float16"):
        run_validation(variant)
