"""Threads that score windows of their own give what one thread gives."""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from gemma_pack.evaluation import workers
from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.evaluation.likelihood import score
from gemma_pack.evaluation.workers import window_workers
from tests.evaluation.conftest import noise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gemma_pack.console import Console
    from gemma_pack.texts import Windows

CPU = torch.device("cpu")


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("most", "each"), [(2, 2), (3, 1), (4, 1), (8, 1)])
def test_workers_share_the_threads_and_give_them_back(monkeypatch: pytest.MonkeyPatch, most: int, each: int) -> None:
    monkeypatch.setattr(workers, "MOST_WORKERS", most)
    together = threading.Barrier(min(most, 4), timeout=20)

    def look(item: int) -> tuple[int, int, bool]:
        together.wait()  # every worker takes one
        return item, torch.get_num_threads(), torch.is_inference_mode_enabled()

    with window_workers(CPU) as few:
        assert few.map(look, range(few.count)) == [(item, each, True) for item in range(min(most, 4))]
        assert torch.get_num_threads() == 4
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [4]


def test_one_thread_or_a_gpu_has_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with window_workers(torch.device("cuda")) as alone:
        assert alone.map(lambda _: threading.current_thread(), [0]) == [threading.main_thread()]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with window_workers(CPU) as alone:
        assert alone.count == 1


def test_an_error_of_a_worker_comes_through() -> None:
    with pytest.raises(ZeroDivisionError), window_workers(CPU) as few:
        few.map(lambda item: 1 // item, [1, 0])


@pytest.mark.usefixtures("four_threads")
def test_workers_score_what_one_scores(
    trained: Path,
    make_variant: Callable[..., Path],
    evaluation_windows: Windows,
    reporter: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, variant = load(trained, "base", "cpu"), load(make_variant(noise(0.1)), "variant", "cpu")
    ids = evaluation_windows.ids[:16]
    by_four = score(base, variant, ids, reporter)
    again = score(base, variant, ids, reporter)
    monkeypatch.setattr(workers, "MOST_WORKERS", 1)
    alone = score(base, variant, ids, reporter)
    for field in fields(alone):
        if getattr(alone, field.name) is not None:
            assert np.array_equal(getattr(by_four, field.name), getattr(again, field.name))
            assert getattr(by_four, field.name) == pytest.approx(getattr(alone, field.name), abs=0.05)
