"""Calibration and refinement killed at random moments go on, repeat little, and end with the same bytes.

The data-free path has its own such test in test_streamed.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tests.quantization.conftest import RECIPE

if TYPE_CHECKING:
    from pathlib import Path

REFINED = RECIPE + "refinement: {steps: 8, windows_a_step: 2, sequence_length: 64, held_out: 4}\n"
KILLING = """
import os, random, signal, sys, time
from pathlib import Path
from gemma_pack.checkpoint import Checkpoint, file_sha256
from gemma_pack.console import Console
from gemma_pack.quantization import calibrated, hidden_states, refinement, variant
from gemma_pack.recipe import parse_recipe
from gemma_pack.sources.directory import check_directory
from gemma_pack.texts import load_windows

base, work, text = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
reporter = Console("quiet")
cut = lambda count: load_windows("builtin", "calibration", base, samples=count, sequence_length=64, seed=1)
job = variant.Job(
    base=Checkpoint.open(base), source=check_directory(base, reporter), recipe=parse_recipe(text, origin="r"),
    recipe_text=text, windows=cut(8), refinement_windows=cut(20), device="cpu",
)
hidden_states._SHARE_FOR_KEEPING = 1e9  # layers are so small here that nothing would be worth keeping
refinement._EVERY = 3

def noted(owner, name, letter):
    original = getattr(owner, name)
    def note(*args):
        os.write(log, letter)
        return original(*args)
    setattr(owner, name, note)

noted(calibrated, "round_group", b"g")
noted(hidden_states.HiddenStates, "advance", b"l")
noted(refinement._Tuning, "take", b"s")

def attempt(target):
    child = os.fork()
    if not child:
        variant.quantize(job, target, reporter)
        os._exit(0)
    return child

def digests(directory):
    return {path.name: file_sha256(path) for path in directory.iterdir()}

log = os.open(work / "log-whole", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
begin = time.monotonic()
assert os.waitpid(attempt(work / "whole"), 0)[1] == 0
seconds = time.monotonic() - begin
killed = 0
for moment in range(10):
    target = work / str(moment)
    log = os.open(work / f"log-{moment}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    child = attempt(target)
    time.sleep(random.Random(moment).uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert os.waitpid(attempt(target), 0)[1] == 0
    assert digests(target) == digests(work / "whole"), moment
    did = (work / f"log-{moment}").read_bytes()
    counts = [did.count(letter) for letter in (b"l", b"g", b"s")]
    assert counts[0] <= 3 + 1 and counts[1] <= 12 + 4 and counts[2] <= 8 + 3, counts
print(killed)
"""


def test_ten_random_moments_of_calibration_and_refinement(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLING, str(tiny_checkpoint), str(tmp_path), REFINED]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5, "most were killed before they were done"
    assert [path.name for path in tmp_path.iterdir() if "journal" in path.name] == []


def test_an_interrupt_says_how_to_go_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(REFINED.replace("steps: 8", "steps: 100"))
    command = [sys.executable, "-m", "gemma_pack", "quantize", str(tiny_checkpoint), "--recipe", "r.yaml", "-o", "out"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and not list(tmp_path.glob(".out.journal-*/layer-000-*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert "interrupted" in errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
