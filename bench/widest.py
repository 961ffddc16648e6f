"""Memory of the calibrated path at the widest Hessian that a Gemma has, 36,864 columns, beside what `plan` says.

    python bench/widest.py WORK [--recipe w4a16-fast]

Two decoder layers, one of each kind, and the embedding, random, in Gemma 2 27B's exact shapes are quantized on the CPU
with 16 windows of 512 tokens. Layers pass one after the other, and the plan counts one of each kind; a model of more
layers was not run. The peak of the whole process stands beside the plan's, and beside a card of 24 GB. The row goes to
stdout and to bench/results/widest.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
from pathlib import Path

from checkpoints import GEMMA_2_27B, write_random
from gpu import random_text
from machine import machine
from speed import VERSIONS, ours, timed

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.console import table
from gemma_pack.quantization.memory import peak_memory
from gemma_pack.recipe import Calibration, load_recipe

SAMPLES, SEQUENCE_LENGTH = 16, 512
CARD_BYTES = 24_000_000_000


def main() -> None:
    """Quantize, and write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipe", default="w4a16-fast")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    base = work / "gemma-2-27b-shapes"
    if not base.is_dir():
        write_random(base, GEMMA_2_27B | {"num_hidden_layers": 2})
    text = random_text(work / "text.txt", 2 * SAMPLES * SEQUENCE_LENGTH)
    choice = ["--calibration", str(text), "--samples", str(SAMPLES), "--sequence-length", str(SEQUENCE_LENGTH)]
    run = timed(options.recipe, ours(base, [options.recipe], work / "made", *choice), work / "made")
    calibration = Calibration(dataset=str(text), samples=SAMPLES, sequence_length=SEQUENCE_LENGTH)
    plan = peak_memory(Checkpoint.open(base), load_recipe(options.recipe), calibration)
    figures = {
        "measured": run.peak_memory_bytes,
        "plan, one process without a GPU": plan.without_gpu_bytes,
        "plan, of it on a GPU": plan.device_bytes,
        "a card of 24 GB": CARD_BYTES,
    }
    print(table([[name, f"{size / 1e9:.1f} GB"] for name, size in figures.items()], header=["peak memory", ""]))
    print(f"{run.seconds:.0f} s")
    made = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "recipe": options.recipe,
        "seconds": run.seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "plan_bytes": plan.without_gpu_bytes,
        "plan_device_bytes": plan.device_bytes,
    }
    path = Path(__file__).parent / "results" / "widest.json"
    path.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
