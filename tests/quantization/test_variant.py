from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_pack.checkpoint import Checkpoint, file_sha256
from gemma_pack.disk import held_alone
from gemma_pack.errors import InvalidUsageError, MachineError, QuantizationError, RecipeError
from gemma_pack.quantization import calibrated, hidden_states
from gemma_pack.quantization.journal import Journal
from gemma_pack.quantization.untouched import prove_untouched
from gemma_pack.quantization.variant import quantize, quantize_together
from gemma_pack.record import read_record
from tests.quantization.conftest import RECIPE
from tests.reports.reports import make_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.packing import RoundedLinear
    from gemma_pack.quantization.variant import Job

    MakeJob = Callable[..., Job]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in directory.iterdir()}


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3", "gemma4_text", "gemma4", "gemma4_unified"])
def test_a_variant_loads_answers_like_its_base_and_leaves_the_rest_alone(
    tiny_checkpoints: Callable[[str], Path], make_job: MakeJob, tmp_path: Path, reporter: Reporter, family: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    base = tiny_checkpoints(family)
    job = make_job(base)
    variant = quantize(job, tmp_path / "variant", reporter)
    assert variant.made_now

    opened = Checkpoint.open(variant.directory)
    linears = 3 * 7 - ("gemma4" in family)  # the full layer of a Gemma 4 makes its values from its keys
    assert sum(name.endswith(".weight_packed") for name in opened.tensors) == linears
    assert not any("lm_head" in name for name in opened.tensors)
    for name, info in job.base.tensors.items():
        if name in opened.tensors:
            assert opened.tensors[name].read() == info.read()
    proof = variant.record.quantization.untouched
    assert len(proof.changed) == linears
    assert proof.untouched == len(job.base.tensors) - linears
    config = json.loads((variant.directory / "config.json").read_text())
    towers = {
        "gemma3": ["vision_tower", "multi_modal_projector"],
        "gemma4": ["vision_tower", "embed_vision"],
        "gemma4_unified": ["embed_vision", "embed_audio", "vision_embedder"],
    }.get(family, [])
    assert config["quantization_config"]["ignore"] == ["lm_head", *(f"re:.*{tower}.*" for tower in towers)]
    assert {k: v for k, v in config.items() if k != "quantization_config"} == job.base.config

    loader = AutoModelForImageTextToText if towers else AutoModelForCausalLM
    ids = torch.from_numpy(job.windows.ids[:4]).long()
    with torch.no_grad():
        p, q = (
            loader.from_pretrained(path, dtype=torch.bfloat16).eval()(input_ids=ids).logits.float().log_softmax(-1)
            for path in (base, variant.directory)
        )
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < kl < 0.3


def test_quantizing_leaves_the_precision_of_float32_products_as_it_was(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rotary embedding is a float32 product, and with rounded positions Gemma is 16 % more perplexed."""

    def precisions() -> list[str]:
        return [torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision]

    before, seen = precisions(), []
    original = calibrated.Decoder.layer_arguments

    def watched(*args: Any) -> Any:
        seen.append(precisions())
        return original(*args)

    monkeypatch.setattr(calibrated.Decoder, "layer_arguments", watched)
    quantize(make_job(tiny_checkpoint), tmp_path / "variant", reporter)
    assert seen
    assert all(found == before for found in seen)
    assert precisions() == before


def test_the_same_job_gives_the_same_bytes_and_is_not_done_twice(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    first = quantize(make_job(tiny_checkpoint), tmp_path / "a", reporter)
    second = quantize(make_job(tiny_checkpoint), tmp_path / "b", reporter)
    assert digests(first.directory) == digests(second.directory)
    again = quantize(make_job(tiny_checkpoint), tmp_path / "a", reporter)
    assert not again.made_now
    assert again.record == first.record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_another_gate_replaces_the_recipe_and_takes_the_verdict_out(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    first = quantize(make_job(tiny_checkpoint), tmp_path / "a", reporter)
    judged = first.record.model_copy(update={"validation": make_report().summary()})
    judged.write(tmp_path / "a")
    weights = {name: digest for name, digest in digests(tmp_path / "a").items() if name.endswith(".safetensors")}
    reworded = RECIPE.replace("for tests", "in other words")
    second = quantize(make_job(tiny_checkpoint, reworded), tmp_path / "a", reporter)
    assert (second.made_now, second.has_new_recipe, second.record) == (False, True, judged)
    assert (tmp_path / "a/recipe.yaml").read_text() == reworded
    tighter = RECIPE.replace("kl_nats: 1", "kl_nats: 0.5")
    third = quantize(make_job(tiny_checkpoint, tighter), tmp_path / "a", reporter)
    assert (third.made_now, third.has_new_recipe, third.record) == (False, True, first.record)
    assert (tmp_path / "a/recipe.yaml").read_text() == tighter
    assert read_record(tmp_path / "a").validation is None
    assert weights.items() <= digests(tmp_path / "a").items()
    assert not quantize(make_job(tiny_checkpoint, tighter), tmp_path / "a", reporter).has_new_recipe


def test_what_a_trainer_left_beside_the_weights_is_not_copied(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base)
    for name in ("optimizer.pt", "pytorch_model.bin", "training_args.bin", "model.gguf"):
        (base / name).write_bytes(b"x")
    (base / "trainer_state.json").write_text("{}")
    made = quantize(make_job(base), tmp_path / "a", reporter).directory
    suffixes = {path.suffix for path in made.iterdir()}
    assert not suffixes & {".pt", ".bin", ".gguf"}
    assert (made / "trainer_state.json").is_file()


def test_a_run_killed_while_it_tidied_up_is_tidied_up_after(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    job = make_job(tiny_checkpoint)
    quantize(job, tmp_path / "a", reporter)
    Journal(tmp_path / "a", job.identity()).save("layer-000-0", {"x": torch.zeros(1)})
    assert not quantize(job, tmp_path / "a", reporter).made_now
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_another_process_is_making_is_left_to_it(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    job = make_job(tiny_checkpoint)
    theirs = Journal(tmp_path / "a", make_job(tiny_checkpoint, seed=2).identity())
    theirs.save("layer-000-0", {"x": torch.zeros(1)})
    with held_alone(tmp_path / "a"):
        with pytest.raises(InvalidUsageError, match="another process is making"):
            quantize(job, tmp_path / "a", reporter)
        assert theirs.holds("layer-000-0")
        quantize(job, tmp_path / "b", reporter)
    assert quantize(job, tmp_path / "a", reporter).made_now


def test_another_job_finds_the_output_in_the_way(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    quantize(make_job(tiny_checkpoint), tmp_path / "a", reporter)
    with pytest.raises(InvalidUsageError, match="in the way"):
        quantize(make_job(tiny_checkpoint, seed=2), tmp_path / "a", reporter)


@pytest.mark.parametrize("finished", [0, 3, 6, 11])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tiny_checkpoint: Path,
    make_job: MakeJob,
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
    finished: int,
) -> None:
    monkeypatch.setattr(hidden_states, "_SHARE_FOR_KEEPING", 1e9)  # keep those of every layer
    undisturbed = quantize(make_job(tiny_checkpoint), tmp_path / "whole", reporter)
    calls = []
    original = calibrated.round_group

    def interrupted(*args: Any) -> list[RoundedLinear]:
        calls.append(1)
        if len(calls) > finished:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "round_group", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(make_job(tiny_checkpoint), tmp_path / "variant", reporter)
    assert not (tmp_path / "variant").exists()

    calls.clear()
    monkeypatch.setattr(calibrated, "round_group", lambda *args: (calls.append(1), original(*args))[1])
    resumed = quantize(make_job(tiny_checkpoint), tmp_path / "variant", reporter)
    assert len(calls) == 3 * 4 - finished  # three layers of four groups
    assert digests(resumed.directory) == digests(undisturbed.directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["variant", "whole"]


def test_a_torn_journal_file_is_computed_again(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("gemma_pack.quantization.variant.staged_directory", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(make_job(tiny_checkpoint), tmp_path / "variant", reporter)
    torn = next(tmp_path.glob(".variant.journal-*/layer-001-2.safetensors"))
    torn.write_bytes(torn.read_bytes()[:1000])
    resumed = quantize(make_job(tiny_checkpoint), tmp_path / "variant", reporter)
    whole = quantize(make_job(tiny_checkpoint), tmp_path / "whole", reporter)
    assert digests(resumed.directory) == digests(whole.directory)


def _interrupt(*_args: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_leaves_nothing_that_looks_whole(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gemma_pack.quantization.variant.write_index", full)
    with pytest.raises(OSError, match="No space left"):
        quantize(make_job(tiny_checkpoint), tmp_path / "variant", reporter)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".variant.journal-")] == []


def test_a_disk_without_room_is_refused_before_the_first_layer(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"bytes": 1 << 40}
    monkeypatch.setattr("gemma_pack.disk.shutil.disk_usage", lambda _path: SimpleNamespace(free=free["bytes"]))
    job = make_job(tiny_checkpoint)
    made = quantize(job, tmp_path / "made", reporter).record.quantization
    assert made is not None
    free["bytes"] = 2 * made.size_bytes - 1
    work = tmp_path / "work"
    with pytest.raises(MachineError, match=r"work needs .* and the disk has .* free"):
        quantize_together({work / "one": job, work / "two": job}, reporter)
    assert not work.exists()
    with monkeypatch.context() as patch:
        patch.setattr("gemma_pack.quantization.variant._round_calibrated", _interrupt)
        with pytest.raises(KeyboardInterrupt):  # there is room for one
            quantize(job, work / "one", reporter)


def test_an_interrupted_run_needs_room_for_the_rest_only(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tiny_checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr("gemma_pack.quantization.variant._finish_rounding", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(job, tmp_path / "variant", reporter)
    asked: list[int] = []
    monkeypatch.setattr("gemma_pack.quantization.variant.require_space", lambda _target, size: asked.append(size))
    quantize(job, tmp_path / "variant", reporter)
    quantize(job, tmp_path / "another", reporter)
    rest, whole = asked
    assert 0.5 * whole < rest < 0.99 * whole


def test_a_norm_rewritten_the_way_upstream_does_fails_the_proof(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """llm-compressor stores Gemma's norms as 1 + w in bf16 while it calibrates, and subtracts 1 again."""
    from gemma_pack.console import Console

    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = (tensors[name] + 1) - 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    base, altered = Checkpoint.open(tiny_checkpoint), Checkpoint.open(copy)
    with pytest.raises(QuantizationError, match=r"layers\.1\.input_layernorm\.weight changed"):
        prove_untouched(base, altered, [], [], Console("quiet"))
    assert prove_untouched(base, base, [], [], Console("quiet")).untouched == len(base.tensors)


def test_a_second_copy_of_the_tied_embedding_fails_the_proof(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from gemma_pack.console import Console

    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    base = Checkpoint.open(tiny_checkpoint)
    with pytest.raises(QuantizationError, match=r"has lm_head\.weight"):
        prove_untouched(base, Checkpoint.open(copy), [], [], Console("quiet"))


def test_ignored_layers_stay_in_bf16_and_are_named_to_the_server(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    recipe = RECIPE + 'ignore: ["re:.*layers.0.*", model.layers.2.mlp.down_proj]\n'
    variant = quantize(make_job(tiny_checkpoint, recipe), tmp_path / "variant", reporter)
    assert len(variant.record.quantization.untouched.changed) == 3 * 7 - 7 - 1
    opened = Checkpoint.open(variant.directory)
    assert "model.layers.0.self_attn.q_proj.weight" in opened.tensors
    ignore = opened.config["quantization_config"]["ignore"]
    assert len(ignore) == 1 + 7 + 1
    assert "model.layers.2.mlp.down_proj" in ignore


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("re:.*q_proj", "fuse into one matrix"),
        ("model.layers.0.mlp.gate_proj", "fuse into one matrix"),
        ("re:.*vision.*", "matches no linear layer"),
        ("lm_head", "matches no linear layer"),
    ],
)
def test_an_ignore_list_that_no_server_loads_is_refused(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter, ignore: str, message: str
) -> None:
    job = make_job(tiny_checkpoint)
    object.__setattr__(job, "recipe", job.recipe.model_copy(update={"ignore": (ignore,)}))
    with pytest.raises(RecipeError, match=message):
        quantize(job, tmp_path / "variant", reporter)
    assert not any(tmp_path.iterdir())


def test_groups_that_do_not_divide_the_columns_are_refused(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    job = make_job(tiny_checkpoint)
    changed = job.recipe.model_copy(update={"group_size": 96})
    object.__setattr__(job, "recipe", changed)
    with pytest.raises(RecipeError, match="do not divide"):
        quantize(job, tmp_path / "variant", reporter)


def test_the_record_says_what_was_done(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    job = make_job(tiny_checkpoint)
    variant = quantize(job, tmp_path / "variant", reporter)
    record = read_record(variant.directory)
    assert record == variant.record
    made = record.quantization
    assert made.recipe_sha256 == job.recipe.digest()
    assert made.calibration == job.windows.record
    assert made.scheme == "int4 weights in groups of 64"
    assert made.base_size_bytes == job.base.size_bytes
    assert made.size_bytes == Checkpoint.open(variant.directory).size_bytes
    assert made.versions["llmcompressor"] == "0.14.0.1"
    assert (variant.directory / "recipe.yaml").read_text() == RECIPE


def test_a_killed_process_goes_on_and_ends_with_the_same_bytes(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    whole = quantize(make_job(tiny_checkpoint), tmp_path / "whole", reporter)
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "gemma_pack", "quantize", str(tiny_checkpoint), "--recipe", "r.yaml", "-o", "out"]
    command += ["--device", "cpu"]  # as the job in this process
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while first.poll() is None and not list(tmp_path.glob(".out.journal-*/layer-000-*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120)
    assert "going on after" in again.stderr
    made = digests(tmp_path / "out")
    assert made.pop("README.md")  # the command writes the card, the stage does not
    assert made == digests(whole.directory)
