"""Containerfile.modelcar: podman and buildah build the same /models as `gemma-pack package`."""

from __future__ import annotations

import platform
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.console import Console
from gemma_pack.oci.package import package
from tests.oci.layouts import blob_path, manifest_for

if TYPE_CHECKING:
    from collections.abc import Callable

CONTAINERFILE = Path(__file__).parents[2] / "Containerfile.modelcar"
GOARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
BASE = "localhost/modelcar-base:test"
BUILT = "localhost/built:test"


@pytest.mark.skipif(GOARCH not in {"amd64", "arm64"}, reason="the embedded base is for amd64 and arm64")
@pytest.mark.parametrize(
    ("builder", "layers", "shards"), [("buildah", "false", 1), ("buildah", "false", 12), ("podman", "true", 12)]
)
def test_builders_and_package_agree_on_every_file(
    builder: str,
    layers: str,
    shards: int,
    raw_checkpoint: Callable[..., Path],
    unpack: Callable[[Path, str], dict[str, Any]],
    container_storage: Any,
    tmp_path: Path,
    tool: Callable[[str], str],
) -> None:
    directory = raw_checkpoint(
        shards=shards,
        files=dict.fromkeys(
            (
                "LICENSE", "NOTICE", "report.json", "report.html", "special_tokens_map.json", "tokenizer.model",
                "training.txt", "losses.svg", "gemma-pack.v1.json", ".hidden.json",
            ),
            "{}",
        ),
    )  # fmt: skip
    for path in directory.iterdir():
        path.chmod(0o600)
    built = build(directory, tmp_path / "built", container_storage, tool, builder, f"--layers={layers}")
    ours = package(directory, tmp_path / "ours", reporter=Console("quiet")).layout
    assert unpack(built, GOARCH) == unpack(ours, GOARCH)


@pytest.mark.skipif(GOARCH not in {"amd64", "arm64"}, reason="the embedded base is for amd64 and arm64")
def test_a_builder_told_the_time_writes_the_same_tar_headers(
    raw_checkpoint: Callable[..., Path], container_storage: Any, tmp_path: Path, tool: Callable[[str], str]
) -> None:
    """Builders cut layers elsewhere and repeat directories; what a layer says of a file is the same on both roads."""
    directory = raw_checkpoint(shards=12)
    options = ("--layers=true", "--timestamp=0")
    built = layers_of(build(directory, tmp_path / "built", container_storage, tool, "buildah", *options))
    ours = layers_of(package(directory, tmp_path / "ours", reporter=Console("quiet")).layout)
    assert built[0] == ours[0], "the base's"
    assert set().union(*built[1:]) == set().union(*ours[1:])
    shards = [sum(".safetensors" in name for name, *_ in layer) for layer in built[2:-1]]
    assert shards == [1, 3, 3, 2, 2, 2]
    named = [{name for name, *_ in layer} for layers in (built, ours) for layer in (layers[1], layers[-1])]
    assert all("models/tokenizer.json" in first for first in named[::2])
    assert all("models/README.md" in last for last in named[1::2])


def build(directory: Path, layout: Path, storage: Any, tool: Callable[[str], str], builder: str, *options: str) -> Path:
    """Build the image of `directory` as the Containerfile says, and copy it to an OCI layout."""
    import modelcar_base_image

    embedded = Path(modelcar_base_image.__file__).parent / "embedded_oci_layout"
    arguments = f"build --quiet --isolation chroot --pull=never --build-arg BASE={BASE} --tag {BUILT}".split()
    commands = [
        [tool("skopeo"), "copy", "--quiet", f"oci:{embedded}", storage.prefix + BASE],
        [tool(builder), *storage.options, *arguments, *options, "--file", str(CONTAINERFILE), str(directory)],
        [tool("skopeo"), "copy", "--quiet", storage.prefix + BUILT, f"oci:{layout}"],
    ]
    for command in commands:
        subprocess.run(command, check=True, timeout=120, capture_output=True)
    return layout


def layers_of(layout: Path) -> list[set[tuple[Any, ...]]]:
    """Return what each layer of the image in a layout says of its members."""
    layers = []
    for layer in manifest_for(layout, GOARCH)["layers"]:
        with tarfile.open(blob_path(layout, layer["digest"])) as tar:
            layers.append({
                (one.name, one.type, one.mode & 0o7777, one.uid, one.gid, one.uname, one.gname, one.mtime, one.size,
                 tuple(one.pax_headers))
                for one in tar
            })  # fmt: skip
    return layers


def test_the_default_base_is_named_with_its_version() -> None:
    (line,) = [line for line in CONTAINERFILE.read_text().splitlines() if line.startswith("ARG BASE=")]
    assert line.rpartition(":")[2] != "latest"


@pytest.mark.skipif(GOARCH not in {"amd64", "arm64"}, reason="the embedded base is for amd64 and arm64")
def test_the_shards_of_a_variant_are_copied_once(
    raw_checkpoint: Callable[..., Path],
    unpack: Callable[[Path, str], dict[str, Any]],
    container_storage: Any,
    tmp_path: Path,
    tool: Callable[[str], str],
) -> None:
    """`quantize` names them otherwise than the hub does (`shard_name`)."""
    from gemma_pack.quantization.shards import shard_name

    directory = raw_checkpoint(shards=12)
    index = (directory / "model.safetensors.index.json").read_text("utf-8")
    for number, shard in enumerate(sorted(directory.glob("*.safetensors"))):
        name = shard_name(("untouched", "quantized")[number % 2], 1 + number // 2)
        index = index.replace(shard.name, name)
        shard.rename(directory / name)
    (directory / "model.safetensors.index.json").write_text(index, "utf-8")
    built = build(directory, tmp_path / "built", container_storage, tool, "buildah", "--layers=true")
    ours = package(directory, tmp_path / "ours", reporter=Console("quiet")).layout
    assert unpack(built, GOARCH) == unpack(ours, GOARCH)
    named = [name for layer in layers_of(built) for name, *_ in layer if name.endswith(".safetensors")]
    assert len(named) == len(set(named)) == 12
