"""KL of every recipe beside other tools' checkpoints of the same base, from the same calibration windows.

    python bench/quality.py WORK [--only NAME ...] [--windows 4]

Everything runs on the demo model. Calibration, choice and report texts come from different Debian packages
(bench/texts.py); the figures are of the report texts, which no setting was chosen by. Each contender is divided by
llm-compressor's preset of the same scheme, text by text and draw by draw of the calibration windows; the range of
these ratios stands beside their mean. What is made and measured is kept in WORK, so that a second run measures what
changed. The tables go to stdout, each row with its date and processor to bench/results/quality.json; a contender is
to be measured in one run with the preset that it is divided by.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from contenders import SAMPLES, SEQUENCE_LENGTH
from machine import processor
from texts import TEXTS, write_mixed, write_text

from gemma_pack.console import Console
from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.evaluation.likelihood import score
from gemma_pack.recipe import load_recipe
from gemma_pack.record import read_record
from gemma_pack.sources import obtain
from gemma_pack.texts import load_windows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gemma_pack.evaluation.engines.in_process import Model

HERE = Path(__file__).parent
EVALUATION_SEED = 11
VERSIONS = ("torch", "transformers", "llmcompressor", "compressed-tensors", "auto-round", "bitsandbytes", "gguf")


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to quantize, and the preset that it is divided by."""

    name: str
    beside: str
    bits: float
    """Of a weight, its share of the scales included."""
    draws: tuple[int, ...] = (1,)
    """Seeds of the calibration windows."""
    recipe: str | None = None
    """A recipe of ours by name or file; None for what bench/contenders.py makes."""

    @property
    def slug(self) -> str:
        """A name for files."""
        return self.name.lower().replace(" ", "-")


def preset(scheme: str, bits: float, draws: tuple[int, ...] = (1,)) -> Contender:
    """Return llm-compressor's preset, which is its own measure."""
    name = f"llm-compressor {scheme}"
    return Contender(name, name, bits, draws)


def ours(recipe: str, scheme: str, bits: float, draws: tuple[int, ...] = (1,)) -> Contender:
    """Return a shipped recipe beside the preset of `scheme`."""
    return Contender(f"gemma-pack {recipe}", f"llm-compressor {scheme}", bits, draws, recipe)


def other(name: str, scheme: str, bits: float, draws: tuple[int, ...] = (1,)) -> Contender:
    """Return another tool's checkpoint beside the preset of `scheme`."""
    return Contender(name, f"llm-compressor {scheme}", bits, draws)


CONTENDERS = (
    preset("W4A16", 4.125, draws=(1, 2)),
    ours("w4a16-fast", "W4A16", 4.125, draws=(1, 2)),
    ours("w4a16", "W4A16", 4.125, draws=(1, 2)),
    other("AutoRound W4A16", "W4A16", 4.125, draws=(1, 2)),
    other("bitsandbytes nf4", "W4A16", 4.127),
    other("GGUF Q4_0", "W4A16", 4.5),
    ours("w4a16-g32", "W4A16", 4.5),
    preset("NVFP4", 4.5),
    ours("nvfp4", "NVFP4", 4.5),
    preset("W8A8", 8),
    ours("w8a8", "W8A8", 8),
    other("bitsandbytes int8", "W8A8", 8),
    preset("FP8", 8),
    ours("fp8", "FP8", 8),
    preset("FP8_DYNAMIC", 8),
    ours("fp8-dynamic", "FP8_DYNAMIC", 8),
    preset("FP8_BLOCK", 8),
    ours("fp8-block", "FP8_BLOCK", 8),
    preset("W8A16", 8),
    ours("w8a16", "W8A16", 8.125),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One contender, calibrated by one draw of windows, on one text."""

    contender: str
    draw: int
    text: str
    kl_nats: float
    ppl_ratio: float
    same_top1_percent: float
    date: str
    machine: str


class Bench:
    """The base, the texts and all that was made and measured in one directory."""

    def __init__(self, work: Path, *, purpose: str, windows: int) -> None:
        """Fetch what is missing. `purpose` is `choose` or `report`; `windows` of each text are scored."""
        self.work, self.purpose, self.windows = work, purpose, windows
        self.base = obtain("demo", revision=None, output=None, offline=True, reporter=Console()).directory
        self.texts = work / "texts"
        self.texts.mkdir(parents=True, exist_ok=True)
        for text in TEXTS:
            if not (self.texts / f"{text.name}.txt").is_file():
                print(write_text(text, self.texts))
        self.calibration = write_mixed(self.texts)
        self._loaded: Model | None = None

    def make(self, contenders: Iterable[Contender]) -> None:
        """Make what is not there yet: our recipes in one run a draw, the others in a process each."""
        wanted = [(contender, draw) for contender in contenders for draw in contender.draws]
        for draw in sorted({draw for _, draw in wanted}):
            self._make_ours([c.recipe for c, its in wanted if its == draw and c.recipe], draw)
        for contender, draw in wanted:
            target = self.target(contender, draw)
            if contender.recipe or target.is_dir():
                continue
            arguments = [contender.name, str(self.base), str(self.calibration), str(draw), str(target)]
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, str(HERE / "contenders.py"), *arguments], check=True)

    def _make_ours(self, recipes: Sequence[str], draw: int) -> None:
        directory = self.work / f"ours-{draw}"
        directory.mkdir(parents=True, exist_ok=True)
        arguments = []
        for recipe in recipes:
            target = directory / f"gemma-3-270m-quantized.{Path(recipe).stem}"
            record = read_record(target) if target.is_dir() else None
            made = record.quantization.recipe_sha256 if record and record.quantization else None
            if made != load_recipe(recipe).digest():
                shutil.rmtree(target, ignore_errors=True)
                arguments += ["--recipe", recipe]
        if arguments:
            size = ["--samples", str(SAMPLES), "--sequence-length", str(SEQUENCE_LENGTH), "--seed", str(draw)]
            command = [sys.executable, "-m", "gemma_pack", "quantize", "demo", "--offline", *arguments, *size]
            subprocess.run([*command, "--calibration", str(self.calibration)], check=True, cwd=directory)

    def target(self, contender: Contender, draw: int) -> Path:
        """Return where a contender lies."""
        if contender.recipe:
            return self.work / f"ours-{draw}" / f"gemma-3-270m-quantized.{Path(contender.recipe).stem}"
        return self.work / "others" / f"{contender.slug}-{draw}"

    def measure(self, contender: Contender, draw: int) -> list[Row]:
        """Return a row for each text, measured now unless these very bytes were before."""
        target = self.target(contender, draw)
        state = hashlib.sha256(f"{self.windows} {self.purpose}".encode())
        for path in sorted(target.glob("*.safetensors")):
            with path.open("rb") as stream:
                state.update(hashlib.file_digest(stream, "sha256").digest())
        kept = self.work / "measured" / f"{contender.slug}-{draw}-{state.hexdigest()[:16]}.json"
        if not kept.is_file():
            rows = self._measure(contender, draw, target)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps([asdict(row) for row in rows]), "utf-8")
        return [Row(**row) for row in json.loads(kept.read_text("utf-8"))]

    def _measure(self, contender: Contender, draw: int, target: Path) -> list[Row]:
        self._loaded = self._loaded or load(self.base, "base", "cpu")
        variant = load(target, "variant", "cpu")
        rows = []
        for path in sorted(self.texts.glob(f"{self.purpose}-*.txt")):
            ids = load_windows(
                str(path), "evaluation", self.base, samples=self.windows, sequence_length=SEQUENCE_LENGTH,
                seed=EVALUATION_SEED,
            ).ids  # fmt: skip
            found = score(self._loaded, variant, ids, Console("quiet"))
            rows.append(
                Row(
                    contender=contender.name,
                    draw=draw,
                    text=path.stem.removeprefix(f"{self.purpose}-"),
                    kl_nats=float(found.kl_nats.mean()),
                    ppl_ratio=float(np.exp((found.nll_variant - found.nll_base).mean())),
                    same_top1_percent=100 * float(found.same_top1.mean()),
                    date=dt.datetime.now(dt.UTC).date().isoformat(),
                    machine=processor(),
                )
            )
        return rows


def markdown(contenders: Sequence[Contender], rows: Sequence[Row]) -> str:
    """Return a table: KL a text (mean over draws), and the mean of the ratios to the preset with their range."""
    texts = sorted({row.text for row in rows})
    kl = {(row.contender, row.draw, row.text): row.kl_nats for row in rows}
    lines = [f"| | bits | {' | '.join(f'KL {text}' for text in texts)} | mean of ratios | range | same first |"]
    lines.append("|---|---:|" + "---:|" * (len(texts) + 3))
    for contender in contenders:
        mine = [row for row in rows if row.contender == contender.name]
        ratios = [
            row.kl_nats / kl[contender.beside, row.draw, row.text]
            for row in mine
            if (contender.beside, row.draw, row.text) in kl
        ]
        means = [f"{np.mean([row.kl_nats for row in mine if row.text == text]):.4f}" for text in texts]
        ratio = f"{np.mean(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}" if ratios else "|"
        top1 = f"{np.mean([row.same_top1_percent for row in mine]):.1f} %"
        lines.append(f"| {contender.name} | {contender.bits:g} | {' | '.join(means)} | {ratio} | {top1} |")
    return "\n".join(lines)


def write_results(name: str, bench: Bench, contenders: Sequence[Contender], rows: Sequence[Row]) -> None:
    """Write the rows, with versions, to bench/results/, where those of contenders not among them stay."""
    path = HERE / "results" / f"{name}.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {"bits": {}, "rows": []}
    kept = [row for row in before["rows"] if row["contender"] not in {contender.name for contender in contenders}]
    made = {
        "versions": {version: importlib.metadata.version(version) for version in VERSIONS},
        "calibration": f"{SAMPLES} x {SEQUENCE_LENGTH} tokens of {len(list(bench.texts.glob('calibrate-*')))} texts, "
        "drawn by the seed in `draw`",
        "measured": f"{bench.windows} windows of {SEQUENCE_LENGTH} tokens of each {bench.purpose} text",
        "bits": before["bits"] | {contender.name: contender.bits for contender in contenders},
        "rows": kept + [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(made, indent=2) + "\n", "utf-8")


def main() -> None:
    """Quantize with every contender, measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--only", action="append", default=[], help="contenders; the results of others stay as they are"
    )
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    contenders = [c for c in CONTENDERS if not options.only or c.name in options.only]
    bench = Bench(options.work.absolute(), purpose="report", windows=options.windows)
    bench.make(contenders)
    rows = [row for c in contenders for draw in c.draws for row in bench.measure(c, draw)]
    for preset in dict.fromkeys(contender.beside for contender in contenders):
        print(markdown([c for c in contenders if c.beside == preset], rows), end="\n\n")
    write_results("quality", bench, contenders, rows)


if __name__ == "__main__":
    main()
