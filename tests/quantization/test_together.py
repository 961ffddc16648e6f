"""Several recipes in one pass, and one run on several processes, give what each gives alone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from gemma_pack.checkpoint import file_sha256
from gemma_pack.quantization import calibrated
from gemma_pack.quantization.packing import unpack
from gemma_pack.quantization.scheme import quantization_scheme
from gemma_pack.quantization.variant import quantize, quantize_together
from gemma_pack.recipe import parse_recipe
from gemma_pack.record import require_record
from tests.quantization.conftest import RECIPE
from tests.quantization.test_equivalence import SMOOTHED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.variant import Job

STATIC = RECIPE.replace("tiny-w4a16", "tiny-fp8").replace("W4A16\ngroup_size: 64", "FP8\nkv_cache: fp8")
REFINED = RECIPE + "refinement: {steps: 4, windows_a_step: 2, sequence_length: 64, held_out: 4}\n"


def digests(directory: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in directory.iterdir()}


def test_recipes_made_in_one_pass_have_the_bytes_of_each_made_alone(
    tiny_checkpoint: Path,
    make_job: Callable[..., Job],
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = {name: make_job(tiny_checkpoint, text) for name, text in (("a", RECIPE), ("b", SMOOTHED), ("c", STATIC))}
    for name, job in jobs.items():
        quantize(job, tmp_path / "alone" / name, reporter)
    layers = []
    original = calibrated.HiddenStates.advance
    monkeypatch.setattr(
        calibrated.HiddenStates, "advance", lambda self, *args: (layers.append(args[0]), original(self, *args))[1]
    )
    made = quantize_together({tmp_path / "together" / name: job for name, job in jobs.items()}, reporter)
    assert layers == [0, 1, 2], "each layer ran once for all"
    for variant in made:
        assert digests(variant.directory) == digests(tmp_path / "alone" / variant.directory.name)
    untouched = [file_sha256(tmp_path / "together" / name / "model-untouched-00001.safetensors") for name in "ac"]
    assert untouched[0] == untouched[1], "a registry stores once what no recipe touches"


def test_a_recipe_that_joins_an_interrupted_one_still_gets_every_layer(
    tiny_checkpoint: Path,
    make_job: Callable[..., Job],
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = make_job(tiny_checkpoint), make_job(tiny_checkpoint, STATIC)
    with monkeypatch.context() as patch:
        original = calibrated.round_group

        def interrupted(*args: Any) -> Any:
            if len(list((tmp_path / "together").glob(".a.journal-*/layer-*"))) == 6:
                raise KeyboardInterrupt
            return original(*args)

        patch.setattr(calibrated, "round_group", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(first, tmp_path / "together" / "a", reporter)
    made = quantize_together({tmp_path / "together" / "a": first, tmp_path / "together" / "b": second}, reporter)
    for variant, job in zip(made, (first, second), strict=True):
        alone = quantize(job, tmp_path / "alone" / variant.directory.name, reporter)
        assert digests(variant.directory) == digests(alone.directory)


def test_two_processes_of_torchrun_make_what_one_makes(
    tiny_checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Sums over windows go in another order, so a weight in the middle of two codes may take the other one.

    Tolerance: one code in a hundred, and the held-out divergence to 2 %.
    """
    (tmp_path / "r.yaml").write_text(REFINED)
    options = ["quantize", str(tiny_checkpoint), "--recipe", "r.yaml", "--device", "cpu", "--format", "json"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--no-python"]
    torchrun.append(f"--log-dir={tmp_path_factory.mktemp('torchrun')}")
    python = [sys.executable, "-m", "gemma_pack"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    for command in (
        [*python, *options, "-o", "one"],
        [sys.executable, *torchrun, "--rdzv-endpoint=127.0.0.1:0", *python, *options, "-o", "two"],
    ):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
    scheme = quantization_scheme(parse_recipe(REFINED, origin="r.yaml"))
    one, two = (
        {k: v for path in (tmp_path / name).glob("*.safetensors") for k, v in load_file(path).items()}
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    names = [key.removesuffix(".weight_packed") for key in one if key.endswith(".weight_packed")]
    assert len(names) == 3 * 7
    weights = [torch.cat([unpack(name, found, scheme).float().flatten() for name in names]) for found in (one, two)]
    apart = (weights[0] - weights[1]).abs() > 0.1 * weights[0].abs().mean()
    assert float(apart.float().mean()) < 0.01
    tuned = [made.refinement for name in ("one", "two") if (made := require_record(tmp_path / name).quantization)]
    kl = [refined.held_out_kl_after_nats for refined in tuned if refined]
    assert kl[1] == pytest.approx(kl[0], rel=0.02)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "r.yaml", "two"]
