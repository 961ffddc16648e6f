"""No GPU is needed to see whether an operation would mix tensors of two devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_stage_keeps_to_its_device() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.imitated_device"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refined, smoothed, scored = done.stdout.splitlines()
    layers = [f"layer-{index:03}-{group}" for index in range(3) for group in range(4)]
    assert refined.split() == ["refined", *layers, "refining", "refined", "refined-result"]
    plans = [f"smoothing-{index:03}" for index in range(3)]
    assert sorted(smoothed.split()) == sorted(["smoothed", *layers, *plans, "equivalence"])
    assert scored == "scored imitated"
