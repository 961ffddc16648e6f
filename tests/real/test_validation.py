"""Validation on the real Gemma 3 270M: what its figures are, and what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SCORING = """
import json, resource, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from gemma_pack.console import Console
from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.evaluation.likelihood import check_bos, measure_noise, score
from gemma_pack.texts import load_windows

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

directory, noise, windows = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(int(sys.argv[4]) or torch.get_num_threads())
ids = load_windows("builtin", "evaluation", directory, samples=windows, sequence_length=256, seed=0).ids
before = peak()
base, variant = load(directory, "base", "cpu"), load(directory, "variant", "cpu")
torch.manual_seed(0)
with torch.no_grad():
    for name, weight in variant.module.model.layers[0].named_parameters():
        if "_proj" in name:  # each group of 128 columns off by its own share, as scales would be
            rows, columns = weight.shape
            shares = 1 + noise * torch.randn(rows, columns // 128, 1)
            weight.copy_((weight.view(rows, -1, 128) * shares).view(rows, columns))
    del weight
scores = score(base, variant, ids, Console("quiet"))
floor, bos = measure_noise(base, ids), check_bos(base, ids)
print(json.dumps({
    "kl": float(scores.kl_nats.mean()), "same": float(scores.same_top1.mean()), "noise_kl": floor.kl_nats,
    "ppl": float(scores.nll_base.mean()), "with_bos": bos.with_bos, "without_bos": bos.without_bos,
    "weights": 2 * (directory / "model.safetensors").stat().st_size, "extra": peak() - before,
    "threads": torch.get_num_threads(),
}))
"""


def measure(directory: Path, noise: float, *, windows: int = 8, threads: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCORING, str(directory), str(noise), str(windows), str(threads)],
        env={"OMP_WAIT_POLICY": "PASSIVE", "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.real
def test_nothing_is_lost_between_a_model_and_itself_and_memory_keeps_its_bound(demo_checkpoint: Path) -> None:
    found = measure(demo_checkpoint, 0.0)
    assert found["kl"] == 0
    assert found["same"] == 1
    assert 0 <= found["noise_kl"] < 0.003  # measured: 0.001 on a CPU
    assert found["with_bos"] < 0.6 * found["without_bos"]
    assert found["extra"] < found["weights"] + 1_000_000_000


@pytest.mark.real
def test_scales_that_are_off_in_one_layer_stand_out_of_the_noise(demo_checkpoint: Path) -> None:
    found = measure(demo_checkpoint, 0.1)
    assert found["kl"] > 5 * found["noise_kl"]
    assert 0.01 < found["kl"] < 0.06  # measured on other text: 0.0215
    assert 0.85 < found["same"] < 0.97


@pytest.mark.real
def test_four_workers_with_as_many_tokens_as_they_take_at_once_keep_the_bound_of_memory(demo_checkpoint: Path) -> None:
    found = measure(demo_checkpoint, 0.0, windows=64, threads=4)  # 4080 tokens of each
    assert found["threads"] == 4
    assert found["kl"] == 0
    assert found["extra"] < found["weights"] + 1_000_000_000
