"""What quantizing a 9B takes on a CUDA machine: one command, which needs no weights and no network.

    python bench/gpu.py WORK [--shapes gemma-2-9b|tiny] [--device cuda|cpu] [--windows 512] [--tokens 2048]

It writes a random checkpoint in Gemma 2 9B's exact shapes, and times `fp8-dynamic` and `w4a16-fast` with windows of
random text beside llm-compressor's `oneshot` with the same scheme and windows, each in a process of its own. Beside
each time stands its floor: bytes read and written over the disk's measured rate, and operations over the measured
rate of bf16 products. Where the demo extra is installed, the 270M by w4a16-fast on CUDA stands beside the CPU.
The table goes to stdout and to bench/results/gpu.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from checkpoints import GEMMA_2_9B, TINY, write_random  # noqa: E402 - beside this script
from speed import Run, demo, timed  # noqa: E402 - scripts beside this one must be found first

from gemma_pack.checkpoint import Checkpoint  # noqa: E402 - scripts beside this one must be found first
from gemma_pack.console import table  # noqa: E402 - scripts beside this one must be found first
from gemma_pack.gemma import decoder_linears, linear_shape  # noqa: E402 - scripts beside this one must be found first

SHAPES = {"gemma-2-9b": GEMMA_2_9B, "tiny": TINY}
ONESHOT = """
import sys, torch
from pathlib import Path
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
from gemma_pack.texts import load_windows
base, text, target, scheme, windows, tokens = *sys.argv[1:5], int(sys.argv[5]), int(sys.argv[6])
given = {}
modifier = QuantizationModifier
if scheme == "W4A16":
    modifier = GPTQModifier
    ids = load_windows(text, "calibration", Path(base), samples=windows, sequence_length=tokens, seed=0).ids
    rows = {"input_ids": ids.tolist(), "attention_mask": [[1] * tokens] * windows}
    given = {"dataset": Dataset.from_dict(rows), "max_seq_length": tokens, "num_calibration_samples": windows}
oneshot(
    model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), output_dir=target,
    processor=AutoTokenizer.from_pretrained(base), recipe=modifier(targets="Linear", scheme=scheme, ignore=["lm_head"]),
    **given,
)
"""


def floor_seconds(base: Path, scheme_bits: int, tokens: int, device: str, work: Path) -> dict[str, float]:
    """Return what reading, writing and computing must take at this machine's measured rates, in seconds.

    With calibration text: one forward pass (2 operations a weight and token), and the products of inputs, symmetric
    but computed whole (2 columns² a token for each distinct input of a layer).
    """
    checkpoint = Checkpoint.open(base)
    layers = decoder_linears(checkpoint.config, "model.")
    groups = [[linear_shape(checkpoint.config, name) for name in group] for layer in layers for group in layer]
    weights = sum(rows * columns for group in groups for rows, columns in group)
    products = sum(group[0][1] ** 2 for group in groups)
    written = checkpoint.size_bytes - 2 * weights + weights * scheme_bits // 8
    operations = 2 * tokens * (weights + products)
    disk = _disk_bytes_a_second(work)
    return {
        "bytes": checkpoint.size_bytes + written,
        "bytes_a_second": disk,
        "operations": operations,
        "operations_a_second": (rate := _operations_a_second(device)),
        "seconds": (checkpoint.size_bytes + written) / disk + operations / rate,
    }


def _disk_bytes_a_second(work: Path) -> float:
    """Write and read back a file past the page cache, as far as the system lets us."""
    data, path = os.urandom(1 << 26), work / "disk"
    begin = time.monotonic()
    with path.open("wb") as stream:
        for _ in range(8):
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    path.read_bytes()
    seconds = time.monotonic() - begin
    path.unlink()
    return 2 * 8 * len(data) / seconds


def _operations_a_second(device: str) -> float:
    side = 8192 if device == "cuda" else 1024
    one, other = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    best = math.inf
    for _ in range(5):
        begin = time.monotonic()
        float((one @ other)[0, 0])  # reading a number waits for the device
        best = min(best, time.monotonic() - begin)
    return 2 * side**3 / best


def random_text(path: Path, words: int) -> Path:
    """Write prose-like noise of the tokenizer's words; calibration's time does not depend on what it says."""
    from tests.tiny import WORDS

    drawn = np.random.default_rng(0).choice(WORDS.split(), (-(-words // 200), 200))
    path.write_text("\n\n".join(map(" ".join, drawn)), "utf-8")
    return path


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="gemma-2-9b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    base = work / options.shapes
    if not base.is_dir():
        write_random(base, SHAPES[options.shapes])
    text = random_text(work / "text.txt", 2 * options.windows * options.tokens)
    rows: list[list[str]] = []
    kept: list[dict[str, object]] = []
    for recipe, scheme, bits in (("fp8-dynamic", "FP8_DYNAMIC", 8), ("w4a16-fast", "W4A16", 4)):
        tokens = options.windows * options.tokens if scheme == "W4A16" else 0
        ours, peer = _pair(base, text, work / "made", recipe, scheme, options)
        floor = floor_seconds(base, bits, tokens, options.device, work)
        rows.append([recipe, *(f"{s:.1f}" for s in (ours.seconds, peer.seconds)), f"{ours.seconds / peer.seconds:.2f}",
                     f"{floor['seconds']:.1f}"])  # fmt: skip
        kept.append({"recipe": recipe, "seconds": ours.seconds, "oneshot_seconds": peer.seconds, "floor": floor})
    print(table(rows, header=["recipe", "s", "oneshot s", "ratio", "floor s"]))
    result: dict[str, object] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "shapes": options.shapes,
        "windows": [options.windows, options.tokens],
        "rows": kept,
    }
    if options.device == "cuda" and options.shapes != "tiny":
        result["demo_seconds"] = {device: _demo(work, device) for device in ("cuda", "cpu")}
    name = "gpu.json" if options.device == "cuda" else f"gpu-{options.shapes}-on-cpu.json"
    target = HERE / "results" if options.device == "cuda" else work
    (target / name).write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def _pair(base: Path, text: Path, target: Path, recipe: str, scheme: str, options: argparse.Namespace) -> list[Run]:
    """Time gemma-pack and oneshot."""
    ours = [sys.executable, "-m", "gemma_pack", "quantize", str(base), "-r", recipe, "-o", str(target)]
    ours += ["--device", options.device]
    if scheme == "W4A16":
        ours += ["--calibration", str(text), "--samples", str(options.windows)]
        ours += ["--sequence-length", str(options.tokens), "--seed", "0"]
    peer = [sys.executable, "-c", ONESHOT, str(base), str(text), str(target), scheme]
    peer += [str(options.windows), str(options.tokens)]
    return [timed(f"gemma-pack {recipe}", ours, target), timed(f"oneshot {scheme}", peer, target)]


def _demo(work: Path, device: str) -> float:
    """Return seconds of w4a16-fast on the real 270M."""
    target = work / "demo-made"
    command = [sys.executable, "-m", "gemma_pack", "quantize", str(demo()), "-r", "w4a16-fast", "-o", str(target)]
    command += ["--device", device, "--calibration", "builtin", "--samples", "64", "--sequence-length", "512"]
    return timed(f"demo on {device}", command, target).seconds


if __name__ == "__main__":
    main()
