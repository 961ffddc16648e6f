"""What this process computes and what vLLM serves agree, within what bf16 arithmetic of two engines leaves."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from gemma_pack.build import EngineChoice, validate_variant
from gemma_pack.console import Console
from gemma_pack.evaluation import profiles
from gemma_pack.evaluation.profiles import Profile

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.report import Report
    from tests.real.vllm_server import AskedServer

pytestmark = pytest.mark.real

PPL_TOLERANCE = 0.01
"""Of either model's perplexity."""
KL_TOLERANCE = 0.15
"""Of the mean KL, which a server lets one estimate from its 20 most likely tokens."""
TOP1_TOLERANCE = 0.02


def test_both_engines_agree_on_the_demo_model(
    vllm_server: AskedServer,
    pulled_variant: Path,
    demo_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(profiles.PROFILES, "agreement", Profile("agreement", 8, 192, 4, 12))
    variant = tmp_path / "variant"
    shutil.copytree(pulled_variant, variant, copy_function=os.link)

    def run(engine: EngineChoice | None) -> Report:
        return validate_variant(
            variant,
            tmp_path / "report",
            against=str(demo_checkpoint),
            profile_name="agreement",
            text="builtin",
            device="cpu",
            engine=engine,
            offline=True,
            reporter=Console("quiet"),
        )

    here, there = run(None), run(EngineChoice(engine=vllm_server.base_url))
    assert there.engine.name == "vllm"
    assert there.engine.base == "transformers"
    assert there.likelihood.ppl_base == pytest.approx(here.likelihood.ppl_base, rel=PPL_TOLERANCE)
    assert there.likelihood.ppl_variant == pytest.approx(here.likelihood.ppl_variant, rel=PPL_TOLERANCE)
    assert there.divergence.kl_nats.value == pytest.approx(here.divergence.kl_nats.value, rel=KL_TOLERANCE)
    assert there.divergence.same_top1.value == pytest.approx(here.divergence.same_top1.value, abs=TOP1_TOLERANCE)
    assert there.divergence.top_k is not None
    assert there.divergence.top_k.kl_lower_bound_nats < there.divergence.kl_nats.value
    answers = list(zip(here.parity.prompts, there.parity.prompts, strict=True))
    assert [h.base for h, _ in answers] == [t.base for _, t in answers]
    assert sum(h.variant == t.variant or t.near_tie or h.near_tie for h, t in answers) >= len(answers) - 1
