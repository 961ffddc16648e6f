"""Drawing a token: greedy, and which tokens top-k, top-p and min-p leave, against counts of many draws."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from gemma_pack.chat.sampling import CREATIVE, GREEDY, Sampling, draw, sampling_of

if TYPE_CHECKING:
    from pathlib import Path

LIKELY = [0.5, 0.3, 0.15, 0.05]


def drawn(sampling: Sampling, seed: int = 0, times: int = 2000) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.tensor(LIKELY).log()
    tokens = torch.tensor([draw(logits, sampling, generator) for _ in range(times)])
    return (torch.bincount(tokens, minlength=4) / times).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (GREEDY, [1, 0, 0, 0]),
        (Sampling(temperature=1), LIKELY),
        (Sampling(temperature=1, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1, top_p=0.81), [0.526, 0.316, 0.158, 0]),
        (Sampling(temperature=1, top_p=0.1), [1, 0, 0, 0]),
        (Sampling(temperature=1, min_p=0.29), [0.526, 0.316, 0.158, 0]),
        (Sampling(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling, expected: list[float]) -> None:
    found = drawn(sampling)
    assert found == pytest.approx(expected, abs=0.04)
    assert [share > 0 for share in found] == [share > 0 for share in expected]


def test_the_same_seed_draws_the_same() -> None:
    sampling = Sampling(temperature=1)
    assert drawn(sampling, seed=1, times=100) == drawn(sampling, seed=1, times=100)
    assert drawn(sampling, seed=1, times=100) != drawn(sampling, seed=2, times=100)


def test_modes(tmp_path: Path) -> None:
    assert sampling_of("chat", tmp_path) == Sampling(temperature=1)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "top_k": 64, "top_p": 0.95}), "utf-8"
    )
    assert sampling_of("chat", tmp_path) == Sampling(temperature=1, top_k=64, top_p=0.95)
    assert sampling_of("factual", tmp_path) == GREEDY
    assert sampling_of("creative", tmp_path) == CREATIVE
