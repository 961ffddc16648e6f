"""Pushing and pulling beside the peers: the same directory, the same kind of registry, the same machine, in turns.

    python bench/transfer.py WORK --beside NAME [--repeats 3] [--gigabytes 3.2] [--storage DIRECTORY]
    python bench/transfer.py WORK --beside pull
    python bench/transfer.py WORK --summary

Each call runs gemma-pack and one contender by turns and adds the pairs to bench/results/transfer.json, so that what
else the machine does hits both alike and no call takes long; `--summary` prints the table of all of them. The peers
written in Python get a virtual environment of their own in WORK, from bench/peers/requirements.txt; buildah, podman,
skopeo, docker-registry and GNU tar come from the distribution.

The directory holds random bytes in safetensors shards of 512 MiB, which no compression helps. Every push goes to an
empty registry, every pull into an empty directory, with all earlier writes on the disk first. The registry keeps its
blobs in WORK, or in the directory that `--storage` names: in memory, it is like a registry on another machine.

Wall time is of all commands together, memory the largest resident set of any process, extra disk the most that lay in
the contender's temporary and working directories, CPU of its own processes; none of them count the registry.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from machine import machine
from transfer_peers import OURS, PUSHES, Place, Steps, ours, pull_ours, pull_skopeo

from gemma_pack.checkpoint import write_index
from gemma_pack.console import table
from gemma_pack.safetensors_file import TensorInfo, read_header, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results/transfer.json"
SHARD_BYTES, TENSOR_BYTES = 512 << 20, 32 << 20
SAMPLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Run:
    """What one contender needed once."""

    pair: str
    """Beside whom, and where the registry kept its blobs."""
    repeat: int
    task: str
    contender: str
    wall_s: float
    cpu_s: float
    memory_bytes: int
    disk_bytes: int


def write_model(directory: Path, size_bytes: int) -> None:
    """Write a checkpoint of random bytes in shards, as a download would leave it."""
    directory.mkdir(parents=True)
    draw = np.random.default_rng(7)
    shards = -(-size_bytes // SHARD_BYTES)
    infos: list[TensorInfo] = []
    for number in range(1, shards + 1):
        path = directory / f"model-{number:05d}-of-{shards:05d}.safetensors"
        names = [f"layers.{number}.part{part}.weight" for part in range(SHARD_BYTES // TENSOR_BYTES)]
        write_safetensors(path, [(name, "U8", (TENSOR_BYTES,), lambda: draw.bytes(TENSOR_BYTES)) for name in names])
        infos += read_header(path)
    write_index(directory, infos)
    config = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    small = {"config.json": config, "generation_config.json": {}, "tokenizer.json": {"model": {"vocab": {"<bos>": 0}}}}
    for name, content in {**small, "tokenizer_config.json": {}}.items():
        (directory / name).write_text(json.dumps(content), "utf-8")
    (directory / "README.md").write_text("# Random bytes\n", "utf-8")


@contextmanager
def registry(data: Path) -> Iterator[str]:
    """Run an empty docker-registry on a free loopback port, and yield its host."""
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(data)}},
        "http": {"addr": host},
    }
    (data / "config.json").write_text(json.dumps(config), "utf-8")
    with (data / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", data / "config.json"], stdout=log, stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(host.rpartition(":")[2]))) == 0:
                    break
            time.sleep(0.05)
        yield host
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(data, ignore_errors=True)


def used_bytes(directory: Path) -> int:
    """Return the bytes on disk of a directory that changes meanwhile; what is mounted into it is not its own."""
    total = 0
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not Path(folder, name).is_mount()]
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512  # noqa: PTH118 - thousands of times
            except FileNotFoundError:
                continue
    return total


def resident_bytes(pid: int) -> int:
    """Return the largest resident set so far of a process or of one that descends from it.

    Not what wait4 says: that is, at least, what the parent had when it forked.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii")
        listed = [path.read_text("ascii").split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (OSError, ValueError):  # it ended meanwhile
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return max([own, *(resident_bytes(int(child)) for children in listed for child in children)])


@dataclass
class Peak:
    """The most that a sampler saw."""

    disk_bytes: int = 0
    memory_bytes: int = 0
    process: int = 0
    """Whose memory to look at; 0 for none."""


def sample(scratch: Path, peak: Peak, ended: threading.Event) -> None:
    """Look again and again until the end."""
    while not ended.wait(SAMPLE_S):
        peak.disk_bytes = max(peak.disk_bytes, used_bytes(scratch))
        if peak.process:
            peak.memory_bytes = max(peak.memory_bytes, resident_bytes(peak.process))


def measure(steps: Steps, scratch: Path) -> tuple[float, float, Peak]:
    """Run the commands of a contender one after the other; return wall and CPU seconds and the peaks."""
    (scratch / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(scratch / "tmp"), "OMP_NUM_THREADS": "1"}
    log_path = scratch.parent / "step.log"
    peak, ended = Peak(), threading.Event()
    sampler = threading.Thread(target=sample, args=(scratch, peak, ended))
    sampler.start()
    begin_s, cpu_s = time.monotonic(), 0.0
    try:
        for step in steps:
            with log_path.open("wb") as log:
                process = subprocess.Popen(list(map(str, step)), stdout=log, stderr=log, env=environment)
                peak.process = process.pid
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{step[:3]} failed\n" + log_path.read_text()[-3000:])
            cpu_s += usage.ru_utime + usage.ru_stime
        wall_s = time.monotonic() - begin_s
    finally:
        ended.set()
        sampler.join()
    peak.disk_bytes = max(peak.disk_bytes, used_bytes(scratch))
    return wall_s, cpu_s, peak


@dataclass(frozen=True, slots=True)
class Bench:
    """One call: where things lie, and under which name its runs are kept."""

    work: Path
    model: Path
    peers: Path
    storage: Path
    pair: str

    def run(self, repeat: int, task: str, contender: str, host: str, steps: Callable[[Place], Steps]) -> Run:
        """Measure one contender in an empty directory, with all earlier writes on the disk."""
        scratch = self.work / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        os.sync()
        wall_s, cpu_s, peak = measure(steps(Place(self.model, scratch, host, self.peers)), scratch)
        for line in Path("/proc/mounts").read_text("utf-8").splitlines():
            if (place := line.split()[1]).startswith(f"{scratch}/"):  # skopeo leaves its storage mounted
                subprocess.run(["umount", "--lazy", place], check=True)
        shutil.rmtree(scratch)
        print(f"{task} {contender}: {wall_s:.1f} s", file=sys.stderr, flush=True)
        return Run(
            self.pair, repeat, task, contender, round(wall_s, 3), round(cpu_s, 3), peak.memory_bytes, peak.disk_bytes
        )

    def pushes(self, repeat: int, contender: str, order: random.Random) -> list[Run]:
        """Push with both to an empty registry each, in either order."""
        runs = []
        both = {OURS: ours, contender: PUSHES[contender]}
        for name in order.sample(sorted(both), 2):
            self._forget()
            with registry(self.storage / "registry") as host:
                runs.append(self.run(repeat, "push", name, host, both[name]))
        return runs

    def pulls(self, repeat: int, order: random.Random) -> list[Run]:
        """Push once, push again unchanged, and pull with both, in either order."""
        self._forget()
        with registry(self.storage / "registry") as host:
            runs = [self.run(repeat, task, OURS, host, ours) for task in ("push", "push again")]
            both = {OURS: pull_ours, "skopeo copy + tar": pull_skopeo}
            return runs + [self.run(repeat, "pull", name, host, both[name]) for name in order.sample(sorted(both), 2)]

    def _forget(self) -> None:
        """Remove what an earlier push remembers of the directory."""
        (self.model.parent / f".{self.model.name}.push.jsonl").unlink(missing_ok=True)


def peers_environment(work: Path) -> Path:
    """Return the virtual environment of the peers, made where it is not there yet."""
    place = work / "peers"
    if not (place / "bin/olot").exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        wanted = HERE / "peers/requirements.txt"
        subprocess.run([place / "bin/python", "-m", "pip", "install", "-q", "-r", wanted], check=True)
    return place


def versions(peers: Path) -> dict[str, str]:
    """Return the version of everything that took part."""
    names = ("olot", "oci-modelcar", "oras")
    asked = {name: [name, "--version"] for name in ("buildah", "podman", "skopeo", "docker-registry", "tar")}
    for name in names:
        asked[name] = [str(peers / "bin/python"), "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]
    said = {name: subprocess.run(one, capture_output=True, text=True, check=True) for name, one in asked.items()}
    return {
        "gemma-pack": importlib.metadata.version("gemma-pack"),
        "python": platform.python_version(),
        **{name: done.stdout.splitlines()[0].strip() for name, done in said.items()},
    }


def keep(bench: Bench, runs: list[Run]) -> None:
    """Put the runs of this call in the place of earlier ones of the same pair."""
    made = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"runs": []}
    others = [run for run in made["runs"] if run["pair"] != bench.pair]
    made = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": machine(),
        "directory_bytes": sum(path.stat().st_size for path in bench.model.iterdir()),
        "shard_bytes": SHARD_BYTES,
        "versions": versions(bench.peers),
        "runs": [*others, *map(asdict, runs)],
    }
    made["summary"] = summarize([Run(**run) for run in made["runs"]])
    RESULTS.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


def summarize(runs: list[Run]) -> list[dict[str, object]]:
    """Return a row for each pair and contender: medians, spread, and our wall time over the other's, by repeats."""
    rows: list[dict[str, object]] = []
    for pair, task, name in dict.fromkeys((run.pair, run.task, run.contender) for run in runs):
        alike = {run.repeat: run for run in runs if (run.pair, run.task, run.contender) == (pair, task, name)}
        own = {run.repeat: run for run in runs if (run.pair, run.task, run.contender) == (pair, task, OURS)}
        walls = sorted(run.wall_s for run in alike.values())
        ratios = sorted(round(own[repeat].wall_s / run.wall_s, 3) for repeat, run in alike.items() if name != OURS)
        rows.append({
            "pair": pair, "task": task, "contender": name, "repeats": len(walls),
            "wall_s": statistics.median(walls), "wall_range_s": [walls[0], walls[-1]],
            "cpu_s": statistics.median(run.cpu_s for run in alike.values()),
            "memory_bytes": max(run.memory_bytes for run in alike.values()),
            "disk_bytes": max(run.disk_bytes for run in alike.values()),
            "ratio": statistics.median(ratios) if ratios else None,
            "ratio_range": [ratios[0], ratios[-1]] if ratios else None,
        })  # fmt: skip
    return rows


def printed(summary: list[dict[str, Any]]) -> str:
    """Return the rows of `summarize` as a table."""
    rows = [
        (
            row["pair"], row["task"], row["contender"], f"{row['wall_s']:.1f}",
            "{:.1f} to {:.1f}".format(*row["wall_range_s"]), f"{row['cpu_s']:.1f}", f"{row['memory_bytes'] / 1e6:.0f}",
            f"{row['disk_bytes'] / 1e9:.2f}", "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        )
        for row in summary
    ]  # fmt: skip
    return table(rows, header=("beside", "task", "contender", "s", "range", "CPU s", "MB", "disk GB", "ours / theirs"))


def main() -> None:
    """Run one pair by turns, or print what earlier calls found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--beside", choices=[*PUSHES, "pull"])
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=3.2)
    parser.add_argument("--storage", type=Path, help="where the registry keeps its blobs  [default: WORK]")
    options = parser.parse_args()
    work = options.work.resolve()
    if options.beside:
        model = work / f"model-{options.gigabytes:g}"
        if not model.is_dir():
            write_model(model, int(options.gigabytes * 1e9))
        pair = options.beside + (" (registry elsewhere)" if options.storage else "")
        bench = Bench(work, model, peers_environment(work), options.storage or work, pair)
        order = random.Random(pair)  # noqa: S311 - the turns
        runs: list[Run] = []
        for repeat in range(options.repeats):
            runs += (
                bench.pulls(repeat, order) if options.beside == "pull" else bench.pushes(repeat, options.beside, order)
            )
        keep(bench, runs)
    if options.summary:
        print(printed(json.loads(RESULTS.read_text("utf-8"))["summary"]))


if __name__ == "__main__":
    main()
