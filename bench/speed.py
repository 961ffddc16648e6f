"""How long quantizing takes, beside llm-compressor and beside plain copying, in pairs and one thing at a time.

    python bench/speed.py PART WORK [--repeats 3]

PART is one of
    calibrated   w4a16-fast on the demo model beside llm-compressor's `oneshot` GPTQ W4A16, 64 windows of 512 tokens
    together     w4a16, w8a8 and fp8 in one command beside each of them alone
    refinement   steps of refinement beside bare forward passes of both models and backward passes of one, same tokens
    streamed     fp8-dynamic on a random checkpoint of 4 GB in Gemma 2's shapes beside llm-compressor's
                 `model_free_ptq` and beside `cp` and sha256 of the same files
Each contender runs in a process of its own, contenders take turns, and a row has the median and the spread of its
ratios to ours. The table goes to stdout and, with versions and date, to bench/results/speed-PART.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from machine import machine

from gemma_pack.console import table

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
VERSIONS = ("torch", "transformers", "llmcompressor", "compressed-tensors")
SAMPLES, SEQUENCE_LENGTH = 64, 512
LAYERS = {"num_hidden_layers": 6}
"""Of Gemma 2 9B, with its embedding: 4.2 GB."""


@dataclass(frozen=True, slots=True)
class Run:
    """One contender, once."""

    contender: str
    seconds: float
    peak_memory_bytes: int


def timed(contender: str, command: list[str], target: Path | None = None) -> Run:
    """Run a command in a process of its own; remove `target` before, and again after."""
    if target:
        shutil.rmtree(target, ignore_errors=True)
    os.sync()
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read() if process.stderr else b""
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begin
    if status:
        sys.exit(errors.decode(errors="replace")[-3000:])
    if target:
        shutil.rmtree(target, ignore_errors=True)
    return Run(contender, seconds, used.ru_maxrss * 1024)


def ours(base: Path, recipes: list[str], target: Path, *arguments: str) -> list[str]:
    """Return the command that quantizes by recipes into directories in `target`."""
    named = [option for recipe in recipes for option in ("-r", recipe)]
    output = ["-o", str(target)] if len(recipes) == 1 else []
    command = [sys.executable, "-m", "gemma_pack", "quantize", str(base), *named, *output, "--device", "cpu"]
    return [*command, *arguments]


def demo() -> Path:
    """Return the demo model's directory, made where it is not yet there."""
    script = "from gemma_pack.console import Console; from gemma_pack.sources import obtain; "
    script += "print(obtain('demo', revision=None, output=None, offline=True, reporter=Console('quiet')).directory)"
    # in a process of its own: children begin with their parent's peak memory
    done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())


def calibrated(work: Path, repeats: int) -> list[Run]:
    """Time w4a16-fast and the preset in turn."""
    base, target = demo(), work / "made"
    text = work / "calibration.txt"
    if not text.is_file():
        from gemma_pack.text_sources import builtin_halves

        text.write_text("\n\n".join(builtin_halves()[0]), "utf-8")
    choice = ["--calibration", str(text), "--samples", str(SAMPLES), "--sequence-length", str(SEQUENCE_LENGTH)]
    peer = [sys.executable, str(HERE / "contenders.py"), "llm-compressor W4A16", str(base), str(text), "0", str(target)]
    runs = []
    for _ in range(repeats):
        runs += [
            timed("gemma-pack w4a16-fast", ours(base, ["w4a16-fast"], target, *choice, "--seed", "0"), target),
            timed("llm-compressor oneshot W4A16", peer, target),
        ]
    return runs


def together(work: Path, repeats: int) -> list[Run]:
    """Time three recipes in one command and each alone."""
    base, recipes = demo(), ["w4a16", "w8a8", "fp8"]
    choice = ["--calibration", "builtin", "--samples", "32", "--sequence-length", str(SEQUENCE_LENGTH)]
    runs = []
    for _ in range(repeats):
        made = [Path(f"{base.name}-quantized.{recipe}") for recipe in recipes]
        runs.append(timed("all three", ours(base, recipes, work, *choice)))
        for target in made:
            shutil.rmtree(target)
        runs += [
            timed(f"{recipe} alone", ours(base, [recipe], work / "made", *choice), work / "made") for recipe in recipes
        ]
    return runs


def refinement(work: Path, repeats: int) -> list[Run]:
    """Time steps of refinement, and the same forward and backward passes with nothing around them."""
    from refinement_step import bare_seconds, refined_seconds

    runs = []
    for _ in range(repeats):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        runs += [
            Run("refinement", refined_seconds(demo(), work), peak),
            Run("bare forward of both, backward of one", bare_seconds(demo()), peak),
        ]
    return runs


def streamed(work: Path, repeats: int) -> list[Run]:
    """Time fp8-dynamic on a checkpoint too large to be only a matter of starting up."""
    base, target = work / "gemma-2-shapes", work / "made"
    if not base.is_dir():
        # in a process of its own: children begin with their parent's peak memory
        made = f"from checkpoints import *; write_random(Path({str(base)!r}), GEMMA_2_9B | {LAYERS})"
        subprocess.run([sys.executable, "-c", f"from pathlib import Path; {made}"], check=True, cwd=HERE)
    options = "scheme='FP8_DYNAMIC', ignore=['lm_head', 're:.*embed_tokens$'], device='cpu', max_workers=2"
    peer = f"from llmcompressor import model_free_ptq; model_free_ptq({str(base)!r}, {str(target)!r}, {options})"
    copy = 'mkdir "$2" && cp "$1"/* "$2" && sha256sum "$2"/*.safetensors && sync -f "$2"'
    runs = []
    for _ in range(repeats):
        runs += [
            timed("gemma-pack fp8-dynamic", ours(base, ["fp8-dynamic"], target), target),
            timed("llm-compressor model_free_ptq", [sys.executable, "-c", peer], target),
            timed("cp and sha256", ["sh", "-c", copy, "sh", str(base), str(target)], target),
        ]
    return runs


PARTS: dict[str, Callable[[Path, int], list[Run]]] = {
    "calibrated": calibrated,
    "refinement": refinement,
    "streamed": streamed,
    "together": together,
}


def main() -> None:
    """Measure one part, print its table and keep its runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("work", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    runs = PARTS[options.part](options.work.resolve(), options.repeats)
    names = list(dict.fromkeys(run.contender for run in runs))
    by_name = {name: [run for run in runs if run.contender == name] for name in names}
    rows = []
    for name, found in by_name.items():
        ratios = [first.seconds / one.seconds for first, one in zip(by_name[names[0]], found, strict=True)]
        rows.append(
            [name, f"{statistics.median(run.seconds for run in found):.1f}",
             f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
             f"{max(run.peak_memory_bytes for run in found) / 1e9:.2f}"]
        )  # fmt: skip
    print(table(rows, header=["contender", "s", f"{names[0]} / this", "peak GB"]))
    made = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "runs": [asdict(run) for run in runs],
    }
    (HERE / "results" / f"speed-{options.part}.json").write_text(json.dumps(made, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
