"""The free memory of a GPU, as far as it can be told without one."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from gemma_pack.evaluation.engines import in_process
from gemma_pack.gpu_memory import free_gpu_bytes

if TYPE_CHECKING:
    import pytest


def test_what_is_no_longer_used_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: steps.append("collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: steps.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (9 if steps == ["collect", "empty"] else 1, 48))
    assert free_gpu_bytes() == 9
    steps.clear()
    assert in_process.fits_memory(0, "cuda") is False
    assert steps == ["collect", "empty"]


def test_a_containers_limit_counts_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "available_memory", lambda: 7 + in_process.ROOM_BYTES)
    assert in_process.fits_memory(7, "cpu")
    assert not in_process.fits_memory(8, "cpu")
