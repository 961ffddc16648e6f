"""The doctor: what it sees on machines that are described to it, and that it never tells a secret."""

from __future__ import annotations

import shlex
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gemma_pack import doctor
from gemma_pack.errors import AccessError
from gemma_pack.machine import NATIVE_FROM, available_memory, find_gpus
from gemma_pack.recipe import load_recipe, shipped_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma_pack.doctor import Finding

H100 = "NVIDIA H100 80GB HBM3, 81559, 81000, 580.65.06, 9.0"
T4 = "Tesla T4, 15360, 15000, 535.104.05, 7.5"
MIG = "NVIDIA A100-SXM4-40GB MIG 1g.5gb, [N/A], [N/A], 535.104.05, 8.0"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that puts a program that prints `text` on an otherwise empty PATH."""
    directory = tmp_path / "programs"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))

    def put(name: str, text: str) -> None:
        program = directory / name
        lines = "\n".join(f"echo {shlex.quote(line)}" for line in text.splitlines())
        program.write_text(f"#!/bin/sh\n{lines}\n", "utf-8")
        program.chmod(0o755)

    return put


def look(
    registries: list[str] | AccessError | None = None, environ: dict[str, str] | None = None
) -> dict[str, Finding]:
    found = doctor.examine(Path.cwd(), registries if registries is not None else [], environ or {})
    return {finding.subject: finding for finding in found}


def test_this_installation_is_as_its_metadata_asks(programs: Callable[[str, str], None]) -> None:
    del programs
    found = look()
    assert not [finding for finding in found.values() if finding.state == "broken"]
    assert f"torch {metadata.version('torch')}" in found["packages"].text
    assert found["Python"].state == "ok"


def test_a_wrong_version_is_broken_and_a_missing_one_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"click": "8.5.1", "httpx": "1.0", "llmcompressor": None, "transformers": "4.55"}
    asked = ["click>=8.1", "httpx<1,>=0.28", "llmcompressor==0.14.0.1", "transformers>=5.15", "pytest; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: asked)
    monkeypatch.setattr(doctor, "_version", installed.get)
    found = look()
    assert found["packages"].text == "1 as required"
    assert found["httpx"].state == found["transformers"].state == "broken"
    assert found["httpx"].remedy == "pip install 'httpx<1,>=0.28'"
    assert found["llmcompressor"].state == "limited"
    assert found["llmcompressor"].text == "is not installed, ==0.14.0.1 is required to quantize and validate"
    assert "pytest" not in found


def test_a_tree_that_is_not_installed_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    found = look()["packages"]
    assert (found.state, found.remedy) == ("broken", "pip install -e .")


def test_without_a_gpu_the_remedy_is_a_driver(programs: Callable[[str, str], None]) -> None:
    del programs
    found = look()["GPU"]
    assert found.state == "limited"
    assert found.remedy
    assert "driver" in found.remedy


def test_gpus_are_judged_by_what_they_can(programs: Callable[[str, str], None]) -> None:
    programs("nvidia-smi", f"{H100}\n{T4}\n{MIG}")
    found = look()
    assert found["GPU 0"].state == "ok"
    assert found["GPU 0"].text == (
        "NVIDIA H100 80GB HBM3, 84.93 GB of 85.52 GB free, compute capability 9.0, driver 580.65.06"
    )
    assert found["GPU 1"].state == "limited"
    assert "no bfloat16" in found["GPU 1"].text
    assert found["GPU 2"].state == "ok"
    assert "? of ? free" in found["GPU 2"].text


def test_recipes_are_held_against_the_compute_capability(programs: Callable[[str, str], None]) -> None:
    programs("nvidia-smi", H100)
    found = look()
    served = found["recipes"].text
    assert found["recipes"].state == "ok"
    assert not [name for name in found if "bnb" in name]
    for name in (name for name in shipped_names() if not load_recipe(name).for_bitsandbytes):
        native = load_recipe(name).scheme != "NVFP4"  # Hopper is 9.0, Blackwell 10.0
        assert (f"recipe {name}" in found) is not native
        assert (name in served.replace(",", "").split()) is native
    programs("nvidia-smi", T4)
    assert look()["recipe w4a16"].remedy == "serve it on Ampere or later"
    programs("nvidia-smi", "NVIDIA A100-SXM4-80GB, 81920, 81000, 580.65.06, 8.0")
    unpacked = look().get("recipe fp8-dynamic")
    assert unpacked is None or "saves memory and no time" in unpacked.text


def test_int8_is_not_for_blackwell(programs: Callable[[str, str], None]) -> None:
    """vLLM 0.32 ends there with `Int8 not supported on SM100` (vllm#54311)."""
    programs("nvidia-smi", "NVIDIA B200, 183359, 180000, 580.65.06, 10.0")
    found = look()
    assert "w8a8" not in found["recipes"].text
    assert found["recipe w8a8"].state == "limited"
    assert "no int8 kernel" in found["recipe w8a8"].text


def test_every_scheme_has_a_floor() -> None:
    assert {load_recipe(name).scheme for name in shipped_names()} <= set(NATIVE_FROM)


@pytest.mark.parametrize(
    ("driver", "state"), [("580.65.06", "ok"), ("535.104.05", "limited"), ("470.1", "limited"), ("?", None)]
)
def test_the_driver_is_held_against_cuda(programs: Callable[[str, str], None], driver: str, state: str | None) -> None:
    programs("nvidia-smi", f"NVIDIA A10, 23028, 22000, {driver}, 8.6")
    found = look().get("driver")
    assert (found.state if found else None) == state


def test_a_machine_without_a_driver_is_asked_no_more(programs: Callable[[str, str], None]) -> None:
    del programs
    assert find_gpus() == []
    found = look()
    assert "driver" not in found
    assert not [name for name in found if name.startswith("recipe ")]
    assert "8.9 for fp8, fp8-dynamic; 9.0 for fp8-block; 10.0 for nvfp4" in found["recipes"].text
    assert "bnb" not in found["recipes"].text  # which vLLM does not load


def test_an_answer_that_is_no_table_is_no_gpu(programs: Callable[[str, str], None]) -> None:
    programs("nvidia-smi", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    assert look()["GPU"].state == "limited"


@pytest.mark.parametrize(("version", "idle"), [("2.13.0+cpu", True), ("2.13.0", False), (None, False)])
def test_a_cpu_build_of_torch_beside_a_gpu_is_said(
    programs: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, version: str | None, *, idle: bool
) -> None:
    programs("nvidia-smi", H100)
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: [])
    monkeypatch.setattr(doctor, "_version", {"torch": version}.get)
    found = look()
    assert ("torch" in found) is idle
    if idle:
        assert found["torch"].remedy == "pip install --force-reinstall torch==2.13.0"


@pytest.mark.parametrize(
    ("limit", "current", "available"),
    [
        ("max", "5", 8_000_000 * 1024),
        ("2000000000", "500000000", 1_500_000_000),
        ("2000000000", "500000000 300000000 100000000", 1_900_000_000),  # of which files, that give way
        ("1000", "2000", 0),
        (None, None, 8_192_000_000),
    ],
)
def test_memory_is_what_the_container_leaves(
    tmp_path: Path, limit: str | None, current: str | None, available: int
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  16000000 kB\nMemAvailable:  8000000 kB\n", "utf-8")
    if limit is not None and current is not None:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(limit, "utf-8")
        used, *files = current.split()
        (tmp_path / "sys/fs/cgroup/memory.current").write_text(used, "utf-8")
        if files:
            kinds = dict(zip(("inactive_file", "active_file"), files, strict=True))
            stat = "".join(f"{kind} {size}\n" for kind, size in kinds.items())
            (tmp_path / "sys/fs/cgroup/memory.stat").write_text(f"anon 7\n{stat}", "utf-8")
    assert available_memory(tmp_path) == available


def test_a_system_without_meminfo_is_no_error(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


def test_a_full_disk_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 600_000_000}))
    found = look()["disk"]
    assert found.state == "limited"
    assert "0.1 billion parameters" in found.text
    assert found.remedy


def test_the_hub_token_is_found_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    found = look()
    assert found["model hub"].state == "ok"
    assert "hf_secret" not in repr(found)
    assert look(environ={"HF_HUB_OFFLINE": "1"})["model hub"].remedy == "unset HF_HUB_OFFLINE"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    missing = look()["model hub"].remedy
    assert missing
    assert "hf auth login" in missing


def test_registries_are_named_or_the_login_is_the_remedy() -> None:
    assert look(["ghcr.io", "quay.io"])["registries"].text == "logins for ghcr.io, quay.io"
    assert look([])["registries"].remedy == "podman login HOST, or docker login HOST"
    broken = look(AccessError("auth.json is not JSON", hint="podman login HOST writes it anew"))["registries"]
    assert (broken.state, broken.text) == ("limited", "auth.json is not JSON")


def test_tools_are_looked_for(programs: Callable[[str, str], None], tmp_path: Path) -> None:
    programs("skopeo", "")
    programs("vllm", "")
    programs("python", "")
    found = look()
    assert found["skopeo"].state == found["vLLM"].state == "ok"
    assert found["podman"].state == found["kubectl"].state == "limited"
    assert found["podman"].remedy == "install podman with the system's package manager"
    lost = look(environ={"GEMMA_PACK_VLLM": str(tmp_path / "nowhere")})["vLLM"]
    assert lost.state == "limited"
    assert "it is not there" in lost.text


def test_everything_that_is_not_well_has_a_remedy(programs: Callable[[str, str], None]) -> None:
    del programs
    assert all(finding.remedy for finding in look().values() if finding.state != "ok")
