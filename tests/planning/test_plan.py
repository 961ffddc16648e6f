"""`gemma-pack plan`: what it says of models that are not there, of this machine, and of a real registry."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack import planning
from gemma_pack.commands import run
from gemma_pack.console import Console
from gemma_pack.gemma import kv_cache_bytes
from gemma_pack.machine import Gpu
from gemma_pack.oci.limits import broken_limits, limits_of
from gemma_pack.oci.push import push
from gemma_pack.planning import findings
from gemma_pack.recipe import load_recipe
from gemma_pack.record import FileDigest, Record, SourceRecord
from gemma_pack.sources.outline import outline
from tests.records import quantized_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oci.registry import Registry

GB = 10**9


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with plenty of everything but GPUs; tests take away what they are about."""
    monkeypatch.setattr(findings, "available_memory", lambda: 1000 * GB)
    monkeypatch.setattr(findings, "find_gpus", list)
    monkeypatch.setattr(findings.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000 * GB}))


def planned(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert run(["plan", *arguments, "--format", "json"]) == code
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def finding(plan: dict[str, Any], subject: str) -> dict[str, Any]:
    [one] = [one for one in plan["findings"] if one["subject"] == subject]
    return dict(one)


def test_a_9b_is_planned_from_a_megabyte_of_headers(
    hollow: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = hollow("gemma-2-9b-it")
    assert sum(path.stat().st_blocks * 512 for path in directory.iterdir()) < 2_000_000
    plan = planned([str(directory), "-r", "w4a16"], capsys)
    assert 18 * GB < plan["base_bytes"] < 19 * GB
    assert plan["parameters"] == plan["base_bytes"] // 2
    linears = plan["base_bytes"] - 2 * 256_000 * 3584
    assert plan["variant_bytes"] < plan["base_bytes"] - 0.7 * linears
    assert max(layer["size_bytes"] for layer in plan["layers"]) < 4.1 * GB
    assert plan["layers"][0]["title"] == "tokenizer.tar"
    assert sum(layer["size_bytes"] for layer in plan["layers"]) < plan["image_bytes"]
    assert plan["node_disk_bytes"] == 2 * plan["image_bytes"]
    assert plan["kv_cache_bytes"] == kv_cache_bytes(outline(str(directory)).checkpoint.config, 8192)
    assert plan["missing_bytes"] is None
    assert plan["serving_gpu_bytes"] > plan["variant_bytes"] + plan["kv_cache_bytes"]


def test_a_recipe_without_text_takes_no_more_memory_for_a_larger_model(
    hollow: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = (planned([str(hollow(name)), "-r", "w8a16"], capsys) for name in ("gemma-3-270m", "gemma-2-9b-it"))
    assert small["memory_bytes"] == large["memory_bytes"] < GB
    calibrated = planned([str(hollow("gemma-3-27b-it")), "-r", "w4a16-fast"], capsys)
    assert 8 * GB < calibrated["memory_bytes"] < calibrated["base_bytes"]


def test_fewer_windows_take_less_memory(hollow: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(hollow("gemma-2-9b-it"))
    all_of_them = planned([directory, "-r", "w4a16-fast"], capsys)["memory_bytes"]
    fewer = planned([directory, "-r", "w4a16-fast", "--samples", "64"], capsys)["memory_bytes"]
    assert all_of_them - fewer == (512 - 64) * 2048 * 3584 * 2


@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_what_this_machine_cannot_ends_with_12_and_a_remedy(
    hollow: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lacking: str,
) -> None:
    monkeypatch.setattr(findings, "available_memory", lambda: GB if lacking == "memory" else 1000 * GB)
    free = GB if lacking == "disk" else 1000 * GB
    monkeypatch.setattr(findings.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    directory = str(hollow("gemma-2-9b-it"))
    plan = planned([directory, "-r", "w4a16-fast"], capsys, code=12)
    assert finding(plan, lacking)["state"] == "broken"
    assert finding(plan, lacking)["remedy"]
    assert run(["plan", directory, "-r", "w4a16-fast"]) == 12
    captured = capsys.readouterr()
    assert f"too little {lacking}" in captured.err
    assert all(len(line) <= 80 for line in captured.out.splitlines())


def test_a_gpu_takes_what_would_lie_in_memory(
    hollow: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gpu(capability: tuple[int, int], free: int = 80 * GB) -> list[Gpu]:
        return [Gpu(name="GPU", total_bytes=free, free_bytes=free, driver="580", capability=capability)]

    directory = str(hollow("gemma-2-9b-it"))
    needed = planned([directory, "-r", "w4a16-fast"], capsys)
    monkeypatch.setattr(findings, "available_memory", lambda: needed["memory_bytes"] - needed["gpu_memory_bytes"])
    assert finding(planned([directory, "-r", "w4a16-fast"], capsys, code=12), "GPU")["state"] == "limited"
    monkeypatch.setattr(findings, "find_gpus", lambda: gpu((9, 0)))
    assert finding(planned([directory, "-r", "w4a16-fast"], capsys), "GPU")["state"] == "ok"
    monkeypatch.setattr(findings, "find_gpus", lambda: gpu((9, 0), free=GB))
    planned([directory, "-r", "w4a16-fast"], capsys, code=12)
    monkeypatch.setattr(findings, "find_gpus", lambda: gpu((8, 0)))
    limited = finding(planned([directory, "-r", "fp8-dynamic"], capsys), "GPU")
    assert limited["state"] == "limited"
    assert "8.9" in limited["text"]


def test_refining_27_billion_parameters_fits_a_card_of_24_gb_when_its_layers_stay_in_host_memory(
    hollow: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(hollow("gemma-3-27b-it"))
    monkeypatch.setattr(findings.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000 * GB}))
    monkeypatch.setattr(findings, "available_memory", lambda: 1000 * GB)
    plan = planned([directory, "-r", "w4a16"], capsys)
    assert plan["gpu_memory_bytes"] > plan["base_bytes"]
    card = Gpu(name="card", total_bytes=24 * GB, free_bytes=23 * GB, driver="580", capability=(8, 9))
    monkeypatch.setattr(findings, "find_gpus", lambda: [card])
    monkeypatch.setattr(findings, "available_memory", lambda: 64 * GB)
    found = finding(planned([directory, "-r", "w4a16"], capsys), "memory")
    assert found["state"] == "ok"
    assert "of card" in found["text"]
    monkeypatch.setattr(findings, "available_memory", lambda: plan["base_bytes"])
    assert finding(planned([directory, "-r", "w4a16"], capsys, code=12), "memory")["state"] == "broken"


@pytest.mark.parametrize("model", ["gemma-2-27b-it", "gemma-3-27b-it"])
@pytest.mark.parametrize("recipe", ["w4a16-fast", "w4a16", "w8a8", "fp8", "nvfp4"])
def test_27_billion_parameters_go_through_a_card_of_24_gb(
    hollow: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    model: str,
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(findings.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000 * GB}))
    monkeypatch.setattr(findings, "available_memory", lambda: 80 * GB)
    card = Gpu(name="card", total_bytes=24 * GB, free_bytes=23 * GB, driver="580", capability=(8, 9))
    monkeypatch.setattr(findings, "find_gpus", lambda: [card])
    found = finding(planned([str(hollow(model)), "-r", recipe], capsys), "memory")
    assert found["state"] == "ok", found


def test_bitsandbytes_is_for_transformers_alone(
    hollow: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "vLLM dropped" in finding(planned([str(hollow("gemma-3-270m")), "-r", "bnb-nf4"], capsys), "GPU")["text"]


def test_the_demo_is_planned_before_it_is_assembled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path))
    plan = planned(["demo", "-r", "w8a16"], capsys)
    assert plan["base_bytes"] == plan["fetch_bytes"] == 536_196_352
    assert list(tmp_path.iterdir()) == []


def test_limits_are_those_of_the_registry() -> None:
    layers = {"model.tar": 11 * GB}
    assert limits_of("ghcr.io").layer_bytes == limits_of("GHCR.io:443").layer_bytes == 10 * GB
    assert limits_of("123.dkr.ecr.eu-west-1.amazonaws.com").layer_bytes == 52_000 * 2**20
    assert "GitHub" in broken_limits("ghcr.io", layers, 1000)[0]
    assert broken_limits("quay.io", layers, 1000) == []
    assert broken_limits("registry.example.com", layers, 1000) == []
    assert "4 MiB" in broken_limits("registry.example.com", layers, 5_000_000)[0]
    assert "40" in broken_limits("registry.example.com", {str(number): 1 for number in range(41)}, 1000)[0]


def _variant(hollow: Callable[[str], Path], recipe: str) -> tuple[Path, Record]:
    """Return a directory with the planned shards, as holes, and a record of the base that it says it is made from."""
    base = hollow("gemma-3-270m")
    digests = tuple(
        FileDigest(path=path.name, sha256=f"{number:064x}", size_bytes=path.stat().st_size)
        for number, path in enumerate(sorted(base.glob("*.safetensors")))
    )
    source = SourceRecord(kind="hub", model_id="google/gemma-3-270m", revision="a" * 40, files=digests)
    Record(source=source).write(base)
    found = outline(str(base))
    sizes = planning.plan_sizes(found.checkpoint, load_recipe(recipe), found.companions)
    quantization = quantized_record().quantization
    assert quantization
    untouched = quantization.untouched.model_copy(update={"changed": tuple(sorted(sizes.changed))})
    made = quantization.model_copy(update={"untouched": untouched, "recipe": recipe})
    return base, Record(source=source, quantization=made)


def test_a_registry_lacks_what_no_image_of_the_same_base_has(
    registry: Registry, hollow: Callable[[str], Path], raw_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    reference = f"{registry.host}/team/gemma"
    base, record = _variant(hollow, "w8a16")
    empty = planned([str(base), "-r", "w8a16", "--push", reference], capsys)
    assert empty["missing_bytes"] == empty["image_bytes"]
    assert not any(layer["in_registry"] for layer in empty["layers"])

    files = {"tokenizer.json": "{}"}
    sibling = raw_checkpoint("sibling", files=files)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (sibling / name).unlink()
    record.write(sibling)
    push(sibling, f"{reference}:w8a16", reporter=Console("quiet"))
    again = planned([str(base), "-r", "w8a16", "--push", reference], capsys)
    shared = [layer for layer in again["layers"] if layer["in_registry"]]
    assert [layer["title"] for layer in shared] == ["tokenizer.tar"]
    assert again["missing_bytes"] < empty["missing_bytes"] - shared[0]["size_bytes"]  # the base image is there, too
    assert "is there with w8a16" in finding(again, "registry")["text"]

    (sibling / "gemma-pack.json").unlink()
    other = record.source.model_copy(update={"revision": "b" * 40, "files": record.source.files[:0]})
    record.model_copy(update={"source": other}).write(sibling)
    push(sibling, f"{reference}:w8a16", reporter=Console("quiet"))
    third = planned([str(base), "-r", "w8a16", "--push", reference], capsys)
    assert not any(layer["in_registry"] for layer in third["layers"])


def test_a_registry_that_does_not_answer_is_a_sentence(
    hollow: Callable[[str], Path], no_logins: None, capsys: pytest.CaptureFixture[str]
) -> None:
    del no_logins
    assert run(["plan", str(hollow("gemma-3-270m")), "-r", "w8a16", "--push", "127.0.0.1:1/x/y"]) == 14
    assert "127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere", "-r", "w8a16"], 2, "neither demo"),
        (["demo", "-r", "w9a16"], 2, "no recipe named w9a16"),
        (["demo"], 2, "--recipe"),
        (["google/gemma-2-9b-it", "-r", "w8a16", "--offline"], 14, "not on this machine"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(
    arguments: list[str],
    code: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path))
    assert run(["plan", *arguments]) == code
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert "Traceback" not in captured.err


def test_it_works_without_torch(hollow: Callable[[str], Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from gemma_pack.commands import run; "
        f"sys.exit(run(['plan', {str(hollow('gemma-3-270m'))!r}, '-r', 'w8a16', '--quiet']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert ran.returncode in (0, 12), ran.stderr
    assert "variant" in ran.stdout


def test_two_recipes_are_not_taken_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "demo", "-r", "w4a16", "-r", "fp8"]) == 2
    assert "a plan is of one recipe, and here are w4a16, fp8" in capsys.readouterr().err
