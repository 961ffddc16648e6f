"""KL of our recipes beside llm-compressor's preset, at the same bytes and the same calibration windows.

    python bench/quality.py WORK [--recipe w4a16 ...] [--preset W4A16] [--windows 12]

Everything runs on the demo model. Calibration, choice and report texts come from different Debian packages
(bench/texts.py); the figures are of the report texts, which no setting was chosen by. The table goes to stdout and,
with versions and date, to bench/results/.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_pack.console import Console, table
from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.evaluation.likelihood import score
from gemma_pack.sources import obtain
from gemma_pack.texts import load_windows

if TYPE_CHECKING:
    from gemma_pack.sources import Source

HERE = Path(__file__).parent
SAMPLES, SEQUENCE_LENGTH, SEED = 64, 512, 1
PARAGRAPHS_IN_TURN = 40
VERSIONS = ("torch", "transformers", "llmcompressor", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one text."""

    contender: str
    text: str
    kl_nats: float
    ppl_ratio: float
    same_top1_percent: float
    size_bytes: int
    seconds: float


def mixed_text(work: Path) -> Path:
    """Return one calibration file that takes paragraphs of each calibration text in turn."""
    texts = work / "texts"
    if not texts.is_dir():
        subprocess.run([sys.executable, str(HERE / "texts.py"), str(texts)], check=True)
    parts = [path.read_text("utf-8").split("\n\n") for path in sorted(texts.glob("calibrate-*.txt"))]
    mixed: list[str] = []
    for begin in range(0, min(map(len, parts)), PARAGRAPHS_IN_TURN):
        for part in parts:
            mixed += part[begin : begin + PARAGRAPHS_IN_TURN]
    path = work / "calibrate-mixed.txt"
    path.write_text("\n\n".join(mixed), "utf-8")
    return path


def quantize_ours(recipe: str, calibration: Path, target: Path) -> float:
    """Quantize with gemma-pack in a process of its own; return seconds."""
    begin = time.monotonic()
    arguments = ["--calibration", str(calibration), "--samples", str(SAMPLES), "--sequence-length"]
    command = [sys.executable, "-m", "gemma_pack", "quantize", "demo", "--recipe", recipe, "-o", str(target)]
    subprocess.run([*command, *arguments, str(SEQUENCE_LENGTH), "--seed", str(SEED)], check=True)
    return time.monotonic() - begin


def quantize_preset(preset: str, source: Source, calibration: Path, target: Path) -> float:
    """Quantize with llm-compressor's GPTQModifier at its defaults, on the same windows; return seconds."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = load_windows(
        str(calibration), "calibration", source.directory,
        samples=SAMPLES, sequence_length=SEQUENCE_LENGTH, seed=SEED,
    )  # fmt: skip
    rows = {"input_ids": windows.ids.tolist(), "attention_mask": np.ones_like(windows.ids).tolist()}
    begin = time.monotonic()
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.bfloat16),
        processor=AutoTokenizer.from_pretrained(source.directory),
        dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(targets="Linear", scheme=preset, ignore=["lm_head"]),
        max_seq_length=SEQUENCE_LENGTH,
        num_calibration_samples=SAMPLES,
        shuffle_calibration_samples=False,
        output_dir=str(target),
    )
    return time.monotonic() - begin


def measure(contender: str, target: Path, seconds: float, source: Source, work: Path, windows: int) -> list[Row]:
    """Return a row for each report text."""
    console = Console("quiet")
    base, variant = load(source.directory, "base", "cpu"), load(target, "variant", "cpu")
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    rows = []
    for path in sorted((work / "texts").glob("report-*.txt")):
        ids = load_windows(
            str(path), "evaluation", source.directory, samples=windows, sequence_length=SEQUENCE_LENGTH, seed=11
        ).ids
        found = score(base, variant, ids, console)
        rows.append(
            Row(
                contender=contender,
                text=path.stem.removeprefix("report-"),
                kl_nats=float(found.kl_nats.mean()),
                ppl_ratio=float(np.exp((found.nll_variant - found.nll_base).mean())),
                same_top1_percent=100 * float(found.same_top1.mean()),
                size_bytes=size,
                seconds=seconds,
            )
        )
    return rows


def main() -> None:
    """Quantize with every contender, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--preset", default="W4A16")
    parser.add_argument("--windows", type=int, default=12)
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    calibration = mixed_text(work)
    source = obtain("demo", revision=None, output=None, offline=True, reporter=Console())
    rows: list[Row] = []
    preset = work / f"preset-{options.preset}"
    if not preset.is_dir():
        (work / f"{preset.name}.seconds").write_text(
            str(quantize_preset(options.preset, source, calibration, preset)), "utf-8"
        )
    seconds = float((work / f"{preset.name}.seconds").read_text("utf-8"))
    rows += measure(f"llm-compressor {options.preset}", preset, seconds, source, work, options.windows)
    for recipe in options.recipe or ["w4a16"]:
        target = work / Path(recipe).stem
        seconds = quantize_ours(recipe, calibration, target)
        rows += measure(f"gemma-pack {Path(recipe).stem}", target, seconds, source, work, options.windows)
    peers = {row.text: row.kl_nats for row in rows if row.contender.startswith("llm-compressor")}
    cells = [
        [r.contender, r.text, f"{r.kl_nats:.4f}", f"{r.kl_nats / peers[r.text]:.2f}", f"{r.ppl_ratio:.4f}",
         f"{r.same_top1_percent:.1f}", f"{r.size_bytes / 1e6:.1f}", f"{r.seconds:.0f}"]
        for r in rows
    ]  # fmt: skip
    header = ["contender", "text", "KL", "KL/peer", "ppl ratio", "top-1 %", "MB", "s"]
    print(table(cells, header=header))
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    made = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, CPU",
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "calibration": f"{SAMPLES} x {SEQUENCE_LENGTH} tokens, seed {SEED}",
        "rows": [asdict(row) for row in rows],
    }
    (results / f"quality-{options.preset.lower()}.json").write_text(json.dumps(made, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
