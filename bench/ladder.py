"""What each part of the w4a16 recipe gains alone: one rung after the other, the same measurement as bench/quality.py.

    python bench/ladder.py WORK [--only RUNG ...] [--purpose report] [--windows 4]

Settings were chosen by the texts of `--purpose choose`. Rungs are w4a16 with a few keys changed. The table goes to
stdout and, with date and versions, to bench/results/ladder.json.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from quality import Bench, Contender, markdown, other, write_results

from gemma_pack.recipe import shipped_text

BITS = 4.125


@dataclass(frozen=True, slots=True)
class Rung:
    """A change to w4a16, None where a key is taken out."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> Contender:
        """Write the rung's recipe and return it as a contender."""
        whole = {**yaml.safe_load(shipped_text("w4a16")), **self.changes, "name": self.name}
        path = directory / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in whole.items() if v is not None}, sort_keys=False), "utf-8")
        return Contender(self.name, "llm-compressor W4A16", BITS, recipe=str(path))


def nearest(observer: str) -> dict[str, Any]:
    """Return the changes for rounding to nearest, which learns nothing from text."""
    return {"algorithm": "nearest", "observer": observer, "gptq": None, "refinement": None, "calibration": None}


RUNGS = (
    Rung("nearest-minmax", nearest("memoryless_minmax")),
    Rung("nearest-signed", nearest("signed_mse")),
    Rung("gptq-minmax", {"observer": "memoryless_minmax", "gptq": {"sink_share": 0}, "refinement": None}),
    Rung("gptq-mse", {"observer": "memoryless_mse", "gptq": {"sink_share": 0}, "refinement": None}),
    Rung("gptq-signed", {"observer": "signed_mse", "gptq": {"sink_share": 0}, "refinement": None}),
    Rung("gptq-counted", {"gptq": {"sink_share": 0}, "refinement": None}),
    Rung("gptq-minmax-sink", {"observer": "memoryless_minmax", "refinement": None}),
    Rung("gptq-signed-sink", {"observer": "signed_mse", "refinement": None}),
    Rung("gptq-counted-sink", {"refinement": None}),
    Rung("refined-without-sink", {"gptq": {"sink_share": 0}}),
    Rung("refined", {}),
)
OTHERS = (other("llm-compressor W4A16", "W4A16", BITS),)


def main() -> None:
    """Make and measure every rung."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", action="append", default=[], help="rungs; the results of others stay as they are")
    parser.add_argument(
        "--purpose", choices=["choose", "report"], default="report", help="settings are chosen by the first"
    )
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    bench = Bench(options.work.absolute(), purpose=options.purpose, windows=options.windows)
    directory = bench.work / "ladder"
    directory.mkdir(exist_ok=True)
    rungs = [rung.write(directory) for rung in RUNGS if not options.only or rung.name in options.only]
    contenders = [*OTHERS, *rungs]
    bench.make(contenders)
    rows = [row for contender in contenders for row in bench.measure(contender, 1)]
    print(markdown(contenders, rows))
    if options.purpose == "report":
        write_results("ladder", bench, contenders, rows)


if __name__ == "__main__":
    main()
