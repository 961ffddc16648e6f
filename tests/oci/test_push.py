from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from gemma_pack.console import Console
from gemma_pack.errors import CheckpointError, InvalidUsageError, OfflineError, RegistryError
from gemma_pack.oci.base import BaseChoice
from gemma_pack.oci.describe import describe
from gemma_pack.oci.layout import Layout
from gemma_pack.oci.package import package
from gemma_pack.oci.push import push
from tests.oci.faulty import Fault, Faulty, Handler, cut_upload, quick, say

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oci.conftest import ContainerStorage
    from tests.oci.registry import Registry

QUIET = Console("quiet")


def inspect(skopeo: str, reference: str) -> dict[str, object]:
    shown = subprocess.run(
        [skopeo, "inspect", "--tls-verify=false", f"docker://{reference}"], capture_output=True, check=True, timeout=60
    )
    document: dict[str, object] = json.loads(shown.stdout)
    return document


def test_a_layout_arrives_whole_and_is_read_by_skopeo(
    registry: Registry, random_layout: Callable[..., Path], tool: Callable[[str], str], tmp_path: Path
):
    source = random_layout()
    root = Layout.open(source).root
    result = push(source, f"{registry.host}/team/gemma:1", reporter=QUIET)
    assert result.digest == root.digest
    assert result.pinned == f"{registry.host}/team/gemma@{root.digest}"
    assert result.uploaded_bytes == result.size_bytes > 2 << 20
    skopeo = tool("skopeo")
    assert inspect(skopeo, result.reference)["Digest"] == root.digest
    copied = tmp_path / "copied"
    subprocess.run(
        [skopeo, "copy", "--all", "--preserve-digests", "--src-tls-verify=false",
         f"docker://{result.reference}", f"oci:{copied}"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert Layout.open(copied).root.digest == root.digest
    names = {path.name: path.read_bytes() for path in (source / "blobs" / "sha256").iterdir()}
    assert {path.name: path.read_bytes() for path in (copied / "blobs" / "sha256").iterdir()} == names


@pytest.mark.parametrize("reader", ["podman", "buildah"])
def test_podman_and_buildah_pull_what_was_pushed_by_its_digest(
    registry: Registry,
    random_layout: Callable[..., Path],
    container_storage: ContainerStorage,
    tool: Callable[[str], str],
    reader: str,
):
    source = random_layout(size_bytes=100_000)
    result = push(source, f"{registry.host}/team/gemma:1", reporter=QUIET)
    pull = [tool(reader), *container_storage.options, "pull", "--quiet", "--tls-verify=false", result.pinned]
    subprocess.run(pull, check=True, capture_output=True, timeout=60)
    kept = subprocess.run(
        [tool("skopeo"), "inspect", "--raw", container_storage.prefix + result.pinned],
        check=True, capture_output=True, timeout=60,
    ).stdout  # fmt: skip
    manifests = [descriptor.digest for descriptor, _ in Layout.open(source).manifests()]
    assert f"sha256:{hashlib.sha256(kept).hexdigest()}" in {result.digest, *manifests}


def test_a_second_push_sends_nothing(registry: Registry, random_layout: Callable[..., Path]):
    source = random_layout()
    first = push(source, f"{registry.host}/team/gemma:1", reporter=QUIET)
    second = push(source, f"{registry.host}/team/gemma:2", reporter=QUIET)
    assert second.digest == first.digest
    assert (second.uploaded_bytes, second.existed_bytes) == (0, first.size_bytes)


def test_a_checkpoint_is_packed_while_it_is_pushed(
    registry: Registry, random_layout: Callable[..., Path], tmp_path: Path
):
    packaged = Layout.open(random_layout())
    before = {path for path in tmp_path.rglob("*") if "registry" not in path.parts}
    result = push(tmp_path / "model", f"{registry.host}/team/gemma:1", reporter=QUIET)
    assert result.digest == packaged.root.digest
    added = {path for path in tmp_path.rglob("*") if "registry" not in path.parts} - before
    assert added == {tmp_path / ".model.push.jsonl"}
    assert push(packaged.directory, f"{registry.host}/team/gemma:1", reporter=QUIET).uploaded_bytes == 0


def test_a_checkpoint_is_pushed_upon_the_base_that_package_would_take(
    registry: Registry, raw_checkpoint: Callable[..., Path], write_base: Callable[..., Path], tmp_path: Path
):
    directory, base = raw_checkpoint(), BaseChoice(str(write_base()))
    packaged = package(directory, tmp_path / "image.oci", base=base, reporter=QUIET)
    assert push(directory, f"{registry.host}/team/gemma:1", base=base, reporter=QUIET).digest == packaged.digest
    with pytest.raises(InvalidUsageError, match="has its base already"):
        push(packaged.layout, f"{registry.host}/team/gemma:1", base=base, reporter=QUIET)


def test_blobs_of_another_repository_are_mounted(registry: Registry, random_layout: Callable[..., Path]):
    source = random_layout()
    push(source, f"{registry.host}/team/base:1", reporter=QUIET)
    result = push(source, f"{registry.host}/team/variant:1", mount_from=[f"{registry.host}/team/base"], reporter=QUIET)
    assert (result.mounted_bytes, result.uploaded_bytes) == (result.size_bytes, 0)


def test_a_push_without_a_tag_is_latest_and_one_by_digest_must_match(
    faulty: Faulty, random_layout: Callable[..., Path]
):
    source = random_layout(size_bytes=1000)
    digest = push(source, f"{faulty.host}/a/b", reporter=QUIET).digest
    assert ("a/b", "latest") in faulty.manifests
    assert push(source, f"{faulty.host}/c/d@{digest}", reporter=QUIET).digest == digest
    faulty.seen.clear()
    with pytest.raises(InvalidUsageError, match="names another image"):
        push(source, f"{faulty.host}/c/d@sha256:{'0' * 64}", reporter=QUIET)
    assert faulty.seen == []


def test_the_tag_comes_last_and_never_before_the_image_is_whole(faulty: Faulty, random_layout: Callable[..., Path]):
    source = random_layout(size_bytes=1000)
    push(source, f"{faulty.host}/a/b:1", reporter=QUIET)
    order = [seen.path.rpartition("/")[2] for seen in faulty.seen if seen.method == "PUT"]
    assert order[-1] == "1"
    assert all(name.startswith("sha256:") for name in order[-4:-1])  # an index and two manifests
    assert not any(name.startswith("sha256:") for name in order[:-4])
    told = [(seen.method, seen.path.rpartition("/")[2]) for seen in faulty.seen]
    before = told[: told.index(("PUT", "1"))]
    assert all(("GET", name) in before for name in order[-4:-1])


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PATCH", "", say(403), times=99),
        Fault("PUT", "uploads", say(500), times=99),
        Fault("PUT", "manifests/sha256", say(400), times=99),
        Fault("PATCH", "", cut_upload(500, keep=False), times=99),
    ],
)
def test_a_push_that_fails_leaves_no_tag(faulty: Faulty, random_layout: Callable[..., Path], fault: Fault):
    faulty.faults = [fault]
    with pytest.raises(Exception, match=r"answered|allow|broke"):
        push(random_layout(size_bytes=1000), f"{faulty.host}/a/b:1", retry=quick(), reporter=QUIET)
    assert ("a/b", "1") not in faulty.manifests


def test_a_registry_that_forgets_a_blob_is_caught(faulty: Faulty, random_layout: Callable[..., Path]):
    def forget(request: Handler) -> None:
        request._route(request.path, {})
        request.state.blobs.pop(next(iter(request.state.blobs)))

    faulty.faults = [Fault("PUT", "manifests/1", forget)]
    with pytest.raises(RegistryError, match="has no bytes of sha256:"):
        push(random_layout(size_bytes=1000), f"{faulty.host}/a/b:1", retry=quick(), reporter=QUIET)


def test_a_tag_that_another_push_moves_is_noticed(faulty: Faulty, random_layout: Callable[..., Path]):
    ours, theirs = random_layout("ours", size_bytes=1000), random_layout("theirs", size_bytes=1000)
    push(theirs, f"{faulty.host}/a/b:2", reporter=QUIET)

    def overtake(request: Handler) -> None:
        request._route(request.path, {})
        request.state.manifests["a/b", "1"] = request.state.manifests["a/b", "2"]

    faulty.faults = [Fault("PUT", "manifests/1", overtake)]
    with pytest.raises(RegistryError, match="another push moved the tag") as caught:
        push(ours, f"{faulty.host}/a/b:1", retry=quick(), reporter=QUIET)
    assert Layout.open(ours).root.digest in (caught.value.hint or "")


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_a_damaged_layout_is_refused(faulty: Faulty, random_layout: Callable[..., Path], damage: str):
    source = random_layout(size_bytes=1000)
    largest = max((source / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    if damage == "remove":
        largest.unlink()
    else:
        data = bytearray(largest.read_bytes())
        data[600] ^= 1
        largest.write_bytes(data[:-1] if damage == "truncate" else data)
    with pytest.raises(RegistryError):
        push(source, f"{faulty.host}/a/b:1", retry=quick(), reporter=QUIET)
    assert ("a/b", "1") not in faulty.manifests


@pytest.mark.parametrize("method", ["POST", "PATCH", "PUT"])
def test_a_checkpoint_that_changes_while_it_is_sent_never_gets_a_tag(
    faulty: Faulty, random_checkpoint: Callable[..., Path], method: str
):
    model = random_checkpoint(shards=1, size_bytes=50_000)
    shard = model / "model.safetensors"

    def change(request: Handler) -> None:
        time.sleep(0.02)  # clocks of file systems tick every few milliseconds
        with shard.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"!")
        request._serve()

    faulty.faults = [Fault(method, "uploads", change, times=99)]  # two layers are on their way: at each one's request
    with pytest.raises(CheckpointError, match=r"model\.safetensors.* changed"):
        push(model, f"{faulty.host}/a/b:1", retry=quick(), reporter=QUIET)
    assert ("a/b", "1") not in faulty.manifests
    faulty.faults = []
    digest = push(model, f"{faulty.host}/a/b:1", retry=quick(), reporter=QUIET).digest
    assert describe(f"{faulty.host}/a/b@{digest}").digest == digest


def test_what_is_neither_layout_nor_checkpoint_is_a_usage_error(tmp_path: Path):
    with pytest.raises(InvalidUsageError, match="neither an OCI layout nor a checkpoint"):
        push(tmp_path, "quay.io/a/b:1", reporter=QUIET)


def test_a_broken_checkpoint_is_found_before_anything_is_sent(faulty: Faulty, random_checkpoint: Callable[..., Path]):
    directory = random_checkpoint(size_bytes=1000)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError):
        push(directory, f"{faulty.host}/a/b:1", reporter=QUIET)
    assert faulty.seen == []


@pytest.mark.parametrize("text", ["ghcr.io/team/base", "team/Base", "team/base:1"])
def test_mounts_come_from_the_same_registry(random_layout: Callable[..., Path], text: str):
    with pytest.raises(InvalidUsageError, match=r"not a repository of quay\.io"):
        push(random_layout(size_bytes=1000), "quay.io/team/gemma:1", mount_from=[text], reporter=QUIET)


def test_nobody_there_is_offline(random_layout: Callable[..., Path], free_port: int):
    with pytest.raises(OfflineError):
        push(random_layout(size_bytes=1000), f"127.0.0.1:{free_port}/a/b:1", reporter=QUIET)


def test_memory_stays_flat_whatever_the_layer_on_the_way_in_and_out(
    registry: Registry, random_layout: Callable[..., Path], tmp_path: Path
):
    reference = f"{registry.host}/team/gemma:1"
    code = (
        "import pathlib, sys; from gemma_pack.commands import run; code = run(sys.argv[1:]);"
        "print(pathlib.Path('/proc/self/status').read_text(), file=sys.stderr); sys.exit(code)"
    )
    source = random_layout(shards=2, size_bytes=64 << 20)
    for arguments in (["push", str(source), reference], ["pull", reference, "-o", str(tmp_path / "pulled")]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--quiet"], check=True, capture_output=True, timeout=120, text=True
        )
        (peak_kib,) = (line.split()[1] for line in done.stderr.splitlines() if line.startswith("VmHWM:"))
        assert int(peak_kib) * 1024 < 100_000_000


def test_a_directory_far_larger_than_memory_allows_is_pushed_in_one_read_without_a_copy(
    registry: Registry, random_checkpoint: Callable[..., Path]
):
    directory = random_checkpoint(shards=1, size_bytes=1000)
    shard = directory / "model.safetensors"
    size_bytes = 1 << 29
    header = json.dumps({"layers.1.weight": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}})
    with shard.open("wb") as stream:  # half a gigabyte that takes no room on the disk
        stream.write(len(header).to_bytes(8, "little") + header.encode())
        stream.truncate(stream.tell() + size_bytes)
    code = """
import pathlib, resource, sys
import gemma_pack.oci.layers as layers
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # a copy of any shard would end here
read, total = layers.read_file, [0]
def counted(*arguments):
    for piece in read(*arguments):
        total[0] += len(piece)
        yield piece
layers.read_file = counted
from gemma_pack.commands import run
code = run(sys.argv[1:])
(peak,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(peak.split()[1], total[0], file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "push", str(directory), f"{registry.host}/team/gemma:1", "--quiet"],
        check=True, capture_output=True, timeout=300, text=True,
    )  # fmt: skip
    peak_kib, read_bytes = map(int, done.stderr.splitlines()[-1].split())
    assert peak_kib * 1024 < 100_000_000
    files = sum(path.stat().st_size for path in directory.iterdir())
    assert files <= read_bytes < files + (4 << 20)  # and the base image


def test_two_pushes_of_one_tag_at_once_leave_one_whole_image(registry: Registry, random_layout: Callable[..., Path]):
    layouts = [random_layout(name, size_bytes=4 << 20) for name in ("ours", "theirs")]
    reference = f"{registry.host}/team/gemma:1"
    outcomes: list[str] = []

    def attempt(source: Path) -> None:
        try:
            outcomes.append(push(source, reference, reporter=QUIET).digest)
        except RegistryError as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=attempt, args=[source]) for source in layouts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    digests = {Layout.open(source).root.digest for source in layouts}
    assert describe(reference).digest in digests
    assert len(outcomes) == 2
    assert all(outcome in digests or "another push moved the tag" in outcome for outcome in outcomes)
    for digest in digests:  # both are whole under their digests, whichever has the tag
        assert describe(f"{registry.host}/team/gemma@{digest}").digest == digest
