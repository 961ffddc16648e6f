"""A build on Ray: what each variant asks for, and what happens when a worker is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gemma_pack import cluster
from gemma_pack.build_file import BuildFile
from gemma_pack.checkpoint import file_sha256
from gemma_pack.matrix import Means, wanted_variants
from gemma_pack.outcome import VariantOutcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster_of_ray import Cluster

RECIPE = "name: {name}\nsummary: for tests\nscheme: W8A16\nalgorithm: nearest\ngate: [{{kl_nats: 100}}]\n"
WAIT_SECONDS = 240


@pytest.fixture
def plan(tmp_path: Path) -> BuildFile:
    names = []
    for number in (0, 1):
        path = tmp_path / f"r{number}.yaml"
        path.write_text(RECIPE.format(name=f"r{number}"))
        names.append(str(path))
    said = {"recipes": names, "output": str(tmp_path / "out"), "validation": {"profile": "smoke"}}
    return BuildFile.model_validate({"model": "demo", **said})


@pytest.fixture
def ray_cluster(unused_tcp_port: int) -> Iterator[Cluster]:
    pytest.importorskip("ray")
    from tests.cluster_of_ray import running_cluster

    with running_cluster(unused_tcp_port) as started:
        yield started


@pytest.fixture
def unused_tcp_port(free_port: int) -> int:
    """Return a port above those that Ray gives to its workers, 10002 to 19999."""
    return free_port if free_port > 20000 else 20000 + free_port % 10000


def build(plan: BuildFile, work: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    path = work / "build.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json", exclude_none=True, exclude_defaults=True)))
    command = [sys.executable, "-m", "gemma_pack", "build", str(path), "--engine", "ray", "--format", "json"]
    return subprocess.Popen(
        command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_variant_of_a_lost_worker_is_run_again_on_another(
    plan: BuildFile, trained: Path, tmp_path: Path, ray_cluster: Cluster
) -> None:
    plan = plan.model_copy(update={"model": str(trained)})
    workers = [ray_cluster.add_worker(number) for number in (1, 2)]
    started = build(plan, tmp_path, ray_cluster.environment)
    logs = [tmp_path / f"out/trained-quantized.r{number}.log" for number in (0, 1)]
    until = time.monotonic() + WAIT_SECONDS
    while not all(log.is_file() and "── on" in log.read_text() for log in logs):
        assert started.poll() is None, started.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.1)
    ray_cluster.kill(workers[0])  # both have begun, and importing torch alone takes longer than this loop
    out, err = started.communicate(timeout=WAIT_SECONDS)
    assert started.returncode == 11, err  # so few windows decide nothing
    assert all("warning" in (said := json.loads(line)) or "error" in said for line in err.splitlines())
    variants = json.loads(out)["variants"]
    assert [(one["recipe"], one["failure"]) for one in variants] == [("r0", None), ("r1", None)]
    assert sorted(log.read_text().count("── on") for log in logs) == [1, 2]
    shards = [
        [file_sha256(shard) for shard in sorted(Path(one["directory"]).glob("*.safetensors"))] for one in variants
    ]
    assert shards[0] == shards[1]
    assert (tmp_path / "out/index.html").is_file()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_variant_that_no_worker_has_memory_for_is_a_row_not_a_wait(
    plan: BuildFile, tmp_path: Path, ray_cluster: Cluster
) -> None:
    done = build(plan, tmp_path, ray_cluster.environment)  # the head computes nothing, and there is no worker
    out, err = done.communicate(timeout=WAIT_SECONDS)
    assert done.returncode == 12, err
    failures = [one["failure"] for one in json.loads(out)["variants"]]
    assert ["no worker of the cluster has" in failure["message"] for failure in failures] == [True, True]


def test_a_variant_asks_for_what_it_takes(plan: BuildFile) -> None:
    one = wanted_variants(plan)[0]
    on_cpu = cluster.demand_of(plan, one, Means(), on_gpu=False)
    on_gpu = cluster.demand_of(plan, one, Means(), on_gpu=True)
    assert (on_cpu.gpus, on_gpu.gpus) == (0, 1)
    assert on_cpu.memory_bytes > cluster.VALIDATION_BYTES
    node = {"Alive": True, "Resources": {"CPU": 4.0, "memory": float(on_cpu.memory_bytes)}}
    assert on_cpu.fits(node)
    assert not on_gpu.fits(node)
    assert not on_cpu.fits({**node, "Alive": False})
    assert not on_cpu.fits({"Alive": True, "Resources": {"CPU": 4.0, "memory": on_cpu.memory_bytes - 1.0}})
    large = plan.model_copy(update={"recipes": ("w4a16",)})
    calibrated = cluster.demand_of(large, wanted_variants(large)[0], Means(), on_gpu=True)
    assert calibrated.memory_bytes >= cluster.VALIDATION_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [({"marker": Path("nowhere/.build")}, "does not see nowhere"), ({"version": "0.0.0"}, "0.0.0 started the build")],
)
def test_a_worker_that_is_not_like_the_others_says_so(
    plan: BuildFile, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / ".build").touch()
    order = cluster._Order(plan=plan, number=1, device="cpu", offline=True, marker=tmp_path / ".build")
    outcome = VariantOutcome.model_validate_json(
        cluster._build_remotely(order.model_copy(update=change).model_dump_json())
    )
    assert outcome.failure
    assert outcome.failure.exit_code == 12
    assert message in outcome.failure.message
    assert not (tmp_path / "out").exists()


def test_a_task_finds_what_lies_here_by_absolute_paths(
    plan: BuildFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "demo", "builtin"):  # directories of these names are not what the words mean
        (tmp_path / name).mkdir()
    (tmp_path / "text.txt").touch()
    said = {"model": "base", "recipes": ("w4a16", "r0.yaml"), "output": "out"}
    found = cluster._with_absolute_paths(plan.model_copy(update=said))
    assert found.model == str(tmp_path / "base")
    assert found.recipes == ("w4a16", str(tmp_path / "r0.yaml"))
    assert found.output == str(tmp_path / "out")
    assert found.validation.text == "builtin"
    assert cluster._with_absolute_paths(plan.model_copy(update={"model": "demo"})).model == "demo"


def test_a_cluster_that_is_not_there_is_said_in_a_sentence(
    plan: BuildFile, tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from gemma_pack.commands import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
        path = tmp_path / "build.yaml"
        path.write_text(yaml.safe_dump(plan.model_dump(mode="json", exclude_none=True, exclude_defaults=True)))
        assert run(["build", str(path), "--engine", "ray"]) == 14
    shown = capsys.readouterr()
    assert f"the Ray cluster at 127.0.0.1:{free_port} cannot be reached" in shown.err
    assert not (tmp_path / "out").exists()
