"""Pushing and pulling beside the peers: the same directory, the same kind of registry, the same machine, in turns.

    python bench/transfer.py WORK --peers VENV [--repeats 3] [--gigabytes 3.2] [--minutes 20]

VENV is a virtual environment with `olot`, `oci-modelcar` and `oras`; buildah, skopeo, docker-registry and GNU tar come
from the distribution. The directory holds random bytes in safetensors shards of 512 MiB, which no compression helps.
Every push goes to an empty registry, every pull into an empty directory, with all earlier writes on the disk first.
Contenders take turns within a repeat, so that what else the machine does hits all alike.

Wall time is of all commands together, memory the largest resident set of any process, extra disk the most that lay in
the contender's temporary and working directories, CPU of its own processes; none of them count the registry. The table
goes to stdout, and with versions and date to bench/results/transfer.json.
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

from gemma_pack.checkpoint import write_index
from gemma_pack.console import table
from gemma_pack.safetensors_file import TensorInfo, read_header, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
CONTAINERFILE = HERE.parent / "Containerfile.modelcar"
SHARD_BYTES, TENSOR_BYTES = 512 << 20, 32 << 20
SAMPLE_S = 0.1
BASE = "localhost/base:bench"


@dataclass(frozen=True, slots=True)
class Run:
    """What one contender needed once."""

    contender: str
    task: str
    wall_s: float
    cpu_s: float
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run happens: `scratch` is empty before and removed after."""

    model: Path
    scratch: Path
    host: str
    peers: Path

    @property
    def reference(self) -> str:
        """What is pushed or pulled."""
        return f"{self.host}/bench/model:1"


Steps = list[list[object]]


def ours(place: Place) -> Steps:
    """gemma-pack, straight from the directory."""
    return [[sys.executable, "-m", "gemma_pack", "push", place.model, place.reference, "--quiet"]]


def olot(place: Place) -> Steps:
    """Layers into a copy of the base's layout, then skopeo; without --preserve-digests it would gzip the weights."""
    layout = place.scratch / "layout"
    files = sorted(place.model.iterdir())
    return [
        ["skopeo", "copy", "--quiet", "--all", f"oci:{embedded_base()}", f"oci:{layout}:latest"],
        [place.peers / "bin/olot", layout, *files],
        ["skopeo", "copy", "--quiet", "--all", "--preserve-digests", "--dest-tls-verify=false",
         f"oci:{layout}:latest", f"docker://{place.reference}"],
    ]  # fmt: skip


def buildah(place: Place) -> Steps:
    """The project's Containerfile with buildah, which podman builds with, too; pushed without compression."""
    store = ["--root", place.scratch / "root", "--runroot", place.scratch / "run", "--storage-driver", DRIVER]
    target = f"containers-storage:[{DRIVER}@{place.scratch}/root+{place.scratch}/run]{BASE}"
    build = ["build", "--quiet", "--layers=true", "--isolation", "chroot", "--pull=never", "--build-arg"]
    return [
        ["skopeo", "copy", "--quiet", f"oci:{embedded_base()}", target],
        ["buildah", *store, *build, f"BASE={BASE}", "--tag", "localhost/built", "--file", CONTAINERFILE, place.model],
        ["buildah", *store, "push", "--quiet", "--disable-compression", "--tls-verify=false", "localhost/built",
         f"docker://{place.reference}"],
    ]  # fmt: skip


def oci_modelcar(place: Place) -> Steps:
    """Its own pipeline with two workers; its image has no base and no index."""
    script = HERE / "peers/oci_modelcar_directory.py"
    return [
        [place.peers / "bin/python", script, place.model, place.host, "bench/model", "1", place.scratch / "spool", 2]
    ]


def oras(place: Place) -> Steps:
    """An artifact of raw files, not an image."""
    return [[place.peers / "bin/python", HERE / "peers/oras_directory.py", place.model, place.reference]]


def floor(place: Place) -> Steps:
    """Read, hash and send over loopback; the other end drops it."""
    return [[sys.executable, HERE / "floor.py", place.model]]


def floor_written(place: Place) -> Steps:
    """The same, and the other end writes it to files, which are counted as extra disk."""
    (place.scratch / "sink").mkdir()
    return [[sys.executable, HERE / "floor.py", place.model, place.scratch / "sink"]]


def pull_ours(place: Place) -> Steps:
    """gemma-pack, into a directory."""
    return [[sys.executable, "-m", "gemma_pack", "pull", place.reference, "-o", place.scratch / "model", "--quiet"]]


def pull_skopeo(place: Place) -> Steps:
    """Skopeo into a layout, then every layer through tar."""
    layout = place.scratch / "layout"
    unpack = f"import json,pathlib,subprocess\nl=pathlib.Path({str(layout)!r})\n{_UNPACK}"
    return [
        ["skopeo", "copy", "--quiet", "--src-tls-verify=false", f"docker://{place.reference}", f"oci:{layout}:latest"],
        [sys.executable, "-c", unpack, place.scratch / "model"],
    ]


_UNPACK = """
import sys
def read(digest): return json.loads((l / "blobs" / digest.replace(":", "/")).read_text())
target = pathlib.Path(sys.argv[1]); target.mkdir()
manifest = read(json.loads((l / "index.json").read_text())["manifests"][0]["digest"])
for layer in manifest["layers"]:
    blob = l / "blobs" / layer["digest"].replace(":", "/")
    subprocess.run(["tar", "-xf", blob, "-C", target], check=True)
"""

PUSHES: dict[str, Callable[[Place], Steps]] = {
    "gemma-pack": ours,
    "olot + skopeo --preserve-digests": olot,
    "buildah": buildah,
    "oci-modelcar (no base)": oci_modelcar,
    "oras-py (raw files)": oras,
    "floor": floor,
    "floor, written": floor_written,
}
EQUAL = ("olot + skopeo --preserve-digests", "buildah", "oci-modelcar (no base)")
"""Peers that make an image with the files under /models."""
PULLS = {"gemma-pack": pull_ours, "skopeo copy + tar": pull_skopeo}
DRIVER = "overlay"


def embedded_base() -> Path:
    """Return the layout of the base image that gemma-pack puts under the weights."""
    import modelcar_base_image

    return Path(modelcar_base_image.__file__).parent / "embedded_oci_layout"


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


def measure(contender: str, task: str, steps: Steps, scratch: Path) -> Run:
    """Run the commands of a contender one after the other."""
    environment = {**os.environ, "TMPDIR": str(scratch / "tmp"), "OMP_NUM_THREADS": "1"}
    (scratch / "tmp").mkdir(exist_ok=True)
    peak = {"disk": 0, "memory": 0}
    running, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            peak["disk"] = max(peak["disk"], used_bytes(scratch))
            if running[0]:
                peak["memory"] = max(peak["memory"], resident_bytes(running[0]))

    sampler = threading.Thread(target=sample)
    sampler.start()
    begin_s, cpu_s = time.monotonic(), 0.0
    try:
        for step in steps:
            with (scratch.parent / "step.log").open("wb") as log:
                process = subprocess.Popen(list(map(str, step)), stdout=log, stderr=log, env=environment)
                running[0] = process.pid
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{contender}: {step[:3]}\n" + (scratch.parent / "step.log").read_text()[-3000:])
            cpu_s += usage.ru_utime + usage.ru_stime
        wall_s = time.monotonic() - begin_s
    finally:
        ended.set()
        sampler.join()
    return Run(contender, task, wall_s, cpu_s, peak["memory"], max(peak["disk"], used_bytes(scratch)))


def run_once(work: Path, model: Path, peers: Path, contender: str, order: random.Random) -> list[Run]:
    """Push with one contender to an empty registry; with ours, also once more unchanged, and pull both ways."""
    runs = []
    scratch = work / "scratch"
    with registry(work / "registry") as host:
        place = Place(model, scratch, host, peers)

        def clean(task: str, name: str, steps: Callable[[Place], Steps]) -> None:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            os.sync()
            runs.append(measure(name, task, steps(place), scratch))
            shutil.rmtree(scratch)
            print(f"{task} {name}: {runs[-1].wall_s:.1f} s", file=sys.stderr, flush=True)

        (model.parent / f".{model.name}.push.jsonl").unlink(missing_ok=True)
        clean("push", contender, PUSHES[contender])
        if contender == "gemma-pack":
            clean("push again", contender, ours)
            for name in order.sample(sorted(PULLS), len(PULLS)):
                clean("pull", name, PULLS[name])
    return runs


def summarize(runs: list[Run]) -> list[list[str]]:
    """Return a row for each contender and task: medians, and the range of the wall time."""
    rows = []
    for task, name in dict.fromkeys((run.task, run.contender) for run in runs):
        own = [run for run in runs if (run.task, run.contender) == (task, name)]
        walls = sorted(run.wall_s for run in own)
        middle = {key: statistics.median(asdict(run)[key] for run in own) for key in ("memory_bytes", "disk_bytes")}
        rows.append([
            task, name, f"{statistics.median(walls):.1f}", f"{walls[0]:.1f} to {walls[-1]:.1f}",
            f"{statistics.median(run.cpu_s for run in own):.1f}", f"{middle['memory_bytes'] / 1e6:.0f}",
            f"{middle['disk_bytes'] / 1e9:.2f}",
        ])  # fmt: skip
    return rows


def ratios(runs: list[Run]) -> dict[str, list[float]]:
    """Return our wall time over that of each peer, repeat by repeat."""
    found: dict[str, list[float]] = {}
    for task, name in dict.fromkeys((run.task, run.contender) for run in runs if run.contender != "gemma-pack"):
        own = [run.wall_s for run in runs if (run.task, run.contender) == (task, "gemma-pack")]
        theirs = [run.wall_s for run in runs if (run.task, run.contender) == (task, name)]
        found[f"{task}: {name}"] = [round(a / b, 3) for a, b in zip(own, theirs, strict=False)]
    equal = {name: statistics.median(r) for name, r in found.items() if r and name.removeprefix("push: ") in EQUAL}
    if equal:
        found["push: fastest equal peer"] = found[max(equal, key=lambda name: equal[name])]
    return found


def versions(peers: Path) -> dict[str, str]:
    """Return the version of everything that took part."""
    asked = {
        "buildah": ["buildah", "--version"],
        "skopeo": ["skopeo", "--version"],
        "docker-registry": ["docker-registry", "--version"],
        **{
            name: [str(peers / "bin/python"), "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]
            for name in ("olot", "oci-modelcar", "oras")
        },
    }
    found = {
        name: subprocess.run(command, capture_output=True, text=True, check=True) for name, command in asked.items()
    }
    return {
        "gemma-pack": importlib.metadata.version("gemma-pack"),
        "python": platform.python_version(),
        **{name: done.stdout.strip().splitlines()[0] for name, done in found.items()},
    }


def main() -> None:
    """Run every contender in turn, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=3.2)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further repeat after this long")
    parser.add_argument("--only", action="append", help="a contender; all unless given")
    options = parser.parse_args()
    work, peers = options.work.resolve(), options.peers.absolute()
    model = work / f"model-{options.gigabytes:g}"
    if not model.is_dir():
        write_model(model, int(options.gigabytes * 1e9))
    order = random.Random(1)  # noqa: S311 - the turns
    runs: list[Run] = []
    begin_s = time.monotonic()
    for repeat in range(options.repeats):
        if time.monotonic() - begin_s > options.minutes * 60:
            break
        contenders = options.only or list(PUSHES)
        for contender in order.sample(contenders, len(contenders)):
            runs += run_once(work, model, peers, contender, order)
        made = {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "directory_bytes": sum(path.stat().st_size for path in model.iterdir()),
            "repeats": repeat + 1,
            "versions": versions(peers),
            "ratios_of_wall_time": ratios(runs),
            "runs": [asdict(run) for run in runs],
        }
        (HERE / "results" / "transfer.json").write_text(json.dumps(made, indent=2) + "\n", "utf-8")
    print(table(summarize(runs), header=("task", "contender", "s", "range", "CPU s", "MB", "disk GB")))
    print(json.dumps(ratios(runs), indent=2))


if __name__ == "__main__":
    main()
