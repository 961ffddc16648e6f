"""What mounts the image: each consumer's own rule, applied to a layout, and tools that are not ours reading it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.console import Console
from gemma_pack.oci.base import BaseChoice
from gemma_pack.oci.package import package
from tests.oci.layouts import blob_path, manifest_for, read_document

if TYPE_CHECKING:
    from collections.abc import Callable

GOARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
# What KServe passes as args of the init container and of the sidecar: CreateModelcarInitContainer and
# CreateModelcarContainer in pkg/utils/storage.go.
INIT = """echo 'Pre-fetching modelcar IMAGE: ' && [ -d /models ] && [ "$(ls -A /models)" ] && \
echo 'OK ... Prefetched and valid (/models exists)' || (echo 'NOK ... Prefetched but modelcar is invalid' && exit 1)"""
SIDECAR = "ln -sf /proc/$$/root/models /mnt/models && sleep infinity"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")


@pytest.fixture
def checkpoint(raw_checkpoint: Callable[..., Path]) -> Path:
    return raw_checkpoint(files={"sub/deep/config.json": '{"not": "the one above"}', "LICENSE": "terms"})


def pack(directory: Path, base: str = "embedded") -> Path:
    return package(directory, directory.parent / "image.oci", base=BaseChoice(base), reporter=Console("quiet")).layout


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("base", ["embedded", "none"])
@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_kserve_fetch_extracts_the_checkpoint(checkpoint: Path, tmp_path: Path, base: str, architecture: str) -> None:
    # The rules of _download_oci in kserve_storage.py: layers by media type as a stream, members below models/ only,
    # renamed, extracted with the data filter.
    modes = {"application/vnd.oci.image.layer.v1.tar+gzip": "r|gz", "application/vnd.oci.image.layer.v1.tar": "r|"}
    layout, out = pack(checkpoint, base), tmp_path / "out"
    out.mkdir()
    for layer in manifest_for(layout, architecture)["layers"]:
        blob = blob_path(layout, layer["digest"])
        with blob.open("rb") as stream, tarfile.open(fileobj=stream, mode=modes[layer["mediaType"]]) as tar:  # type: ignore[call-overload]
            for member in tar:
                if member.name.startswith("models/"):
                    member.name = member.name.removeprefix("models/")
                    tar.extract(member, path=out, filter="data")
    assert contents(out) == contents(checkpoint)


@pytest.mark.parametrize("base", ["embedded", "none"])
def test_kserve_native_finds_readable_files_below_models(
    checkpoint: Path, base: str, unpack: Callable[[Path, str], dict[str, Any]]
) -> None:
    # A pod mounts the image with `subPath: models`, and the server reads it under any user.
    members = unpack(pack(checkpoint, base), "amd64")
    below = {name: member for name, member in members.items() if name.split("/")[0] == "models"}
    files = {name.removeprefix("models/"): m for name, m in below.items() if m.kind == tarfile.REGTYPE}
    assert {name: m.sha256 for name, m in files.items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in contents(checkpoint).items()
    }
    assert {(m.mode, m.owner) for m in files.values()} == {(0o644, (0, 0))}
    folders = {name: m for name, m in below.items() if m.kind == tarfile.DIRTYPE}
    assert sorted(folders) == ["models", "models/sub", "models/sub/deep"]
    assert {(m.mode, m.owner) for m in folders.values()} == {(0o755, (0, 0))}
    assert not [m for m in below.values() if m.kind not in (tarfile.REGTYPE, tarfile.DIRTYPE)]


def shell_base(write_base: Callable[..., Path]) -> Path:
    """Return an image with the sh, ls, ln and sleep of this machine: what a ubi-micro has to offer."""
    programs = [Path(found).resolve() for name in ("sh", "ls", "ln", "sleep") if (found := shutil.which(name))]
    names = {f"bin/{name}": Path(str(shutil.which(name))).resolve() for name in ("sh", "ls", "ln", "sleep")}
    for program in programs:
        listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
        names |= {path.lstrip("/"): Path(path).resolve() for path in re.findall(r"(/\S+) \(0x", listed)}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, path in sorted(names.items()):
            tar.add(path, name)
    return write_base(tar=archive.getvalue(), platforms=(f"linux/{GOARCH}",))


def root_filesystem(layout: Path, target: Path) -> tuple[Path, list[str]]:
    """Unpack the image of this machine's architecture and return its root and its entry point."""
    manifest = manifest_for(layout, GOARCH)
    for layer in manifest["layers"]:
        with tarfile.open(blob_path(layout, layer["digest"])) as tar:
            tar.extractall(target, filter="tar")
    (target / "mnt").mkdir()
    return target, read_document(layout, manifest["config"]["digest"])["config"].get("Entrypoint", [])


@needs_root
@pytest.mark.parametrize("base", ["embedded", "shell"])
def test_kserve_modelcar_commands_work(
    checkpoint: Path, tmp_path: Path, base: str, write_base: Callable[..., Path], tool: Callable[[str], str]
) -> None:
    if base == "embedded" and GOARCH not in {"amd64", "arm64"}:
        pytest.skip("the embedded base is for amd64 and arm64")
    layout = pack(checkpoint, base if base == "embedded" else str(shell_base(write_base)))
    root, entry_point = root_filesystem(layout, tmp_path / "root")
    run = [tool("chroot"), str(root), *entry_point, "sh", "-c"]
    subprocess.run([*run, INIT], check=True, timeout=20, capture_output=True)
    link = root / "mnt/models"
    with subprocess.Popen([*run, SIDECAR], stdout=subprocess.DEVNULL) as sidecar:
        try:
            deadline = time.monotonic() + 10
            while not link.is_symlink():
                assert time.monotonic() < deadline, "the sidecar made no link"
                time.sleep(0.02)
            # The server follows the link into the sidecar's root, through the process that it names.
            assert str(link.readlink()) == f"/proc/{sidecar.pid}/root/models"
            assert contents(link.readlink()) == contents(checkpoint)
        finally:
            sidecar.kill()


@needs_root
def test_kserve_modelcar_refuses_an_image_without_models(
    tmp_path: Path, write_base: Callable[..., Path], tool: Callable[[str], str]
) -> None:
    # The counterpart, so that the test above cannot pass by chance.
    root, _ = root_filesystem(shell_base(write_base), tmp_path / "root")
    outcome = subprocess.run(
        [tool("chroot"), str(root), "sh", "-c", INIT], timeout=20, capture_output=True, check=False
    )
    assert outcome.returncode == 1


def test_skopeo_reads_the_layout_and_copies_it_unchanged(
    checkpoint: Path, tmp_path: Path, tool: Callable[[str], str]
) -> None:
    skopeo, layout = tool("skopeo"), pack(checkpoint)
    (root,) = json.loads((layout / "index.json").read_text())["manifests"]
    inspected = json.loads(
        subprocess.run(
            [skopeo, "inspect", "--override-arch", "arm64", "--override-os", "linux", f"oci:{layout}"],
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
    )
    assert inspected["Digest"] == root["digest"]
    assert inspected["Architecture"] == "arm64"
    assert inspected["Labels"]["name"] == "gemma3_text"
    assert inspected["Layers"] == [layer["digest"] for layer in manifest_for(layout, "arm64")["layers"]]
    copy = [
        skopeo,
        "copy",
        "--quiet",
        "--multi-arch",
        "all",
        "--preserve-digests",
        f"oci:{layout}",
        f"oci:{tmp_path}/copy",
    ]
    subprocess.run(copy, check=True, timeout=60)
    assert contents(tmp_path / "copy" / "blobs") == contents(layout / "blobs")


def test_podman_and_buildah_unpack_what_was_packed(
    checkpoint: Path, container_storage: Any, tool: Callable[[str], str]
) -> None:
    layout = pack(checkpoint)
    name = "localhost/model:test"
    subprocess.run(
        [tool("skopeo"), "copy", "--quiet", f"oci:{layout}", f"{container_storage.prefix}{name}"],
        check=True,
        timeout=60,
    )
    where = container_storage.options

    def output(*command: str) -> str:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout.strip()

    inspected = json.loads(output(tool("podman"), *where, "image", "inspect", name))[0]
    assert inspected["Labels"]["io.k8s.display-name"] == "gemma3_text"
    assert inspected["Created"] == "1970-01-01T00:00:00Z"
    container = output(tool("buildah"), *where, "from", "--pull-never", name)
    try:
        models = Path(output(tool("buildah"), *where, "mount", container)) / "models"
        assert contents(models) == contents(checkpoint)
        assert {path.stat().st_mode & 0o7777 for path in models.rglob("*") if path.is_file()} == {0o644}
        assert {path.stat().st_mode & 0o7777 for path in (models, *models.rglob("*")) if path.is_dir()} == {0o755}
        assert {(path.stat().st_uid, path.stat().st_gid) for path in models.rglob("*")} == {(0, 0)}
    finally:
        output(tool("buildah"), *where, "rm", container)
