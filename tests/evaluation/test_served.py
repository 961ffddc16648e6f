"""Validation through servers: the same figures as in this process, the right models only, nothing read twice."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.build import EngineChoice, validate_variant
from gemma_pack.errors import CheckpointError, EngineError, InvalidUsageError, MachineError
from gemma_pack.evaluation import profiles, served, validation
from gemma_pack.evaluation.engines import server
from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.evaluation.engines.reading import ResidentReader
from gemma_pack.evaluation.profiles import Profile
from gemma_pack.reports.markdown import render_markdown
from tests.evaluation.conftest import noise
from tests.evaluation.fake_vllm import FakeVllm, fake_vllm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gemma_pack.console import Console
    from gemma_pack.report import Report

TINY = Profile("tiny", windows=36, sequence_length=48, prompts=3, answer_tokens=6)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(profiles.PROFILES, "tiny", TINY)
    monkeypatch.setattr(server, "PAUSE_S", 0.001)


@pytest.fixture
def serve() -> Iterator[Callable[[Path], FakeVllm]]:
    with ExitStack() as stack:
        yield lambda directory: stack.enter_context(fake_vllm(directory))


@pytest.fixture
def run_validation(trained: Path, tmp_path: Path, reporter: Console) -> Callable[..., Report]:
    def run(variant: Path, engine: EngineChoice | None = None, **options: Any) -> Report:
        settings: dict[str, Any] = {"against": str(trained), "profile_name": "tiny", "text": "builtin", "device": "cpu"}
        return validate_variant(variant, tmp_path / "report", engine=engine, reporter=reporter, **settings | options)

    return run


@pytest.fixture
def variant(make_variant: Callable[..., Path]) -> Path:
    return make_variant(noise(0.3))


@pytest.mark.parametrize("with_base", [False, True])
def test_a_server_gives_the_figures_of_this_process(
    variant: Path,
    trained: Path,
    serve: Callable[[Path], FakeVllm],
    run_validation: Callable[..., Report],
    tmp_path: Path,
    *,
    with_base: bool,
) -> None:
    here = run_validation(variant)
    fakes = [serve(variant), *([serve(trained)] if with_base else [])]
    choice = EngineChoice(engine=fakes[0].address, base_engine=fakes[1].address if with_base else None)
    there = run_validation(variant, choice)
    assert there.likelihood.ppl_variant == pytest.approx(here.likelihood.ppl_variant, rel=1e-3)
    assert there.likelihood.ln_ratio.value == pytest.approx(here.likelihood.ln_ratio.value, abs=1e-3)
    assert there.divergence.same_top1.value == pytest.approx(here.divergence.same_top1.value, abs=0.005)
    assert there.divergence.delta_p_rms == pytest.approx(here.divergence.delta_p_rms, rel=0.02)
    assert there.parity.identical_share == here.parity.identical_share
    assert there.parity.divergent_share == pytest.approx(here.parity.divergent_share, abs=0.06)
    assert [p.base for p in there.parity.prompts] == [p.base for p in here.parity.prompts]
    assert there.protocol.bos_check.without_bos == pytest.approx(here.protocol.bos_check.without_bos, rel=1e-3)
    seen = there.divergence.top_k
    assert seen is not None
    assert seen.k == 20
    assert seen.kl_lower_bound_nats < here.divergence.kl_nats.value
    assert there.divergence.kl_nats.value == pytest.approx(here.divergence.kl_nats.value, rel=0.1)
    assert there.engine.name == "vllm"
    assert there.engine.base == (None if with_base else "transformers")
    assert not (tmp_path / "report.partial").exists()
    assert "lower bound" in render_markdown(there, "variant")
    for fake in fakes:
        assert all(body["prompt"][0] == 2 or body["prompt"].count(2) == 0 for body in fake.asked)
        assert max(body["prompt"].count(2) for body in fake.asked) == 1


def test_a_server_of_the_base_is_no_server_of_the_variant(
    variant: Path, trained: Path, serve: Callable[[Path], FakeVllm], run_validation: Callable[..., Report]
) -> None:
    fake = serve(trained)
    with pytest.raises(CheckpointError, match="should serve the variant, and what it says is nearer to the base"):
        run_validation(variant, EngineChoice(engine=fake.address))


def test_a_server_of_the_variant_is_no_server_of_the_base(
    variant: Path, serve: Callable[[Path], FakeVllm], run_validation: Callable[..., Report]
) -> None:
    fake = serve(variant)
    with pytest.raises(CheckpointError, match="should serve the base, and what it says is nearer to the variant"):
        run_validation(variant, EngineChoice(engine=fake.address, base_engine=fake.address))


def test_another_model_is_refused(
    variant: Path, tiny_checkpoint: Path, serve: Callable[[Path], FakeVllm], run_validation: Callable[..., Report]
) -> None:
    fake = serve(tiny_checkpoint)
    with pytest.raises(CheckpointError, match="serves another model than this variant"):
        run_validation(variant, EngineChoice(engine=fake.address))


def test_what_was_read_before_a_server_died_is_kept_and_not_read_again(
    variant: Path, serve: Callable[[Path], FakeVllm], run_validation: Callable[..., Report], tmp_path: Path
) -> None:
    fake = serve(variant)
    fake.die_after = 11  # after the window that shows which model is served
    with pytest.raises(EngineError, match="RemoteProtocolError") as caught:
        run_validation(variant, EngineChoice(engine=fake.address))
    assert caught.value.exit_code == 1
    assert "10 of 36 windows of the variant are kept in" in (caught.value.hint or "")
    assert not (tmp_path / "report").exists()
    fake.die_after, fake.asked = None, []
    report = run_validation(variant, EngineChoice(engine=fake.address))
    windows = [body for body in fake.asked if body.get("prompt_logprobs") == served.TOP_K]
    assert len(windows) == 26
    assert len(report.windows) == 36
    assert not (tmp_path / "report.partial").exists()


def test_a_server_that_begins_to_serve_another_model_passes_nothing(
    make_variant: Callable[..., Path],
    trained: Path,
    serve: Callable[[Path], FakeVllm],
    run_validation: Callable[..., Report],
) -> None:
    variant = make_variant(noise(0.6))
    fake = serve(variant)
    right = fake.reader
    fake.die_after = 3
    with pytest.raises(EngineError):
        run_validation(variant, EngineChoice(engine=fake.address))
    fake.die_after = None
    fake.reader = ResidentReader(load(trained, "variant", "cpu"), right.describe)
    with pytest.raises(CheckpointError, match="serves another model than this variant"):
        run_validation(variant, EngineChoice(engine=fake.address))
    fake.reader = right  # corrected: what the other model said is not held against it
    report = run_validation(variant, EngineChoice(engine=fake.address))
    here = run_validation(variant)
    assert report.divergence.kl_nats.value == pytest.approx(here.divergence.kl_nats.value, rel=0.1)


@pytest.mark.parametrize("absent", ["engine", "base_engine"])
def test_a_server_that_is_not_there_is_missed_before_anything_is_done(
    variant: Path,
    serve: Callable[[Path], FakeVllm],
    run_validation: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    absent: str,
) -> None:
    monkeypatch.setattr(validation, "audit_weights", lambda *_, **__: pytest.fail("the weights were audited"))
    monkeypatch.setattr(server, "PAUSE_S", 1000)  # and nobody waits for it
    addresses = {"engine": serve(variant).address, absent: "http://127.0.0.1:9"}
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9 does not answer") as caught:
        run_validation(variant, EngineChoice(**addresses))
    assert caught.value.hint == "start the server, or correct its address"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("report")]


def test_windows_longer_than_a_server_reads_are_refused_before_anything_is_done(
    variant: Path,
    serve: Callable[[Path], FakeVllm],
    run_validation: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validation, "audit_weights", lambda *_, **__: pytest.fail("the weights were audited"))
    fake = serve(variant)
    fake.max_model_len = 24
    with pytest.raises(InvalidUsageError, match="reads 23 tokens at most, and a window has 48"):
        run_validation(variant, EngineChoice(engine=fake.address))


def test_vllm_must_be_somewhere(
    variant: Path, run_validation: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GEMMA_PACK_VLLM", raising=False)
    with pytest.raises(MachineError, match="there is no vLLM here"):
        run_validation(variant, EngineChoice(engine="vllm"))
    monkeypatch.setenv("GEMMA_PACK_VLLM", "/nowhere/python")
    with pytest.raises(MachineError, match="names /nowhere/python, and it is not there"):
        run_validation(variant, EngineChoice(engine="vllm"))
