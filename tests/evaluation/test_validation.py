"""The whole of a validation: what is refused, what is measured, what is written."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.build import validate_variant
from gemma_pack.errors import CheckpointError, InvalidUsageError, MachineError, TextError
from gemma_pack.evaluation import profiles
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
    few = Profile("few", windows=8, sequence_length=64, prompts=1, answer_tokens=4)
    monkeypatch.setitem(profiles.PROFILES, "few", few)
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
    with pytest.raises(MachineError, match=r"need 1\.00 GB together, and cpu has 500\.00 MB free") as caught:
        run_validation(make_variant())
    assert caught.value.exit_code == 12


def test_float16_is_refused(make_variant: Callable[..., Path], run_validation: Callable[..., Report]) -> None:
    variant = make_variant()
    config = json.loads((variant / "config.json").read_text())
    (variant / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    with pytest.raises(CheckpointError, match="float16"):
        run_validation(variant)
