"""The processes of one run, as they are joined."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from gemma_pack.quantization.ranks import joined_ranks

if TYPE_CHECKING:
    import pytest


def test_processes_wait_while_the_first_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _, **rest: asked.update(rest))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with joined_ranks(torch.device("cpu")) as ranks:
        assert (ranks.rank, ranks.size) == (1, 2)
    assert asked["timeout"] > timedelta(hours=10)  # 54 GB at 1.5 MB/s
