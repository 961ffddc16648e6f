"""Containerfile.modelcar: podman and buildah build the same /models as `gemma-pack package`."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.console import Console
from gemma_pack.oci.package import package

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
    import modelcar_base_image

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
    embedded = Path(modelcar_base_image.__file__).parent / "embedded_oci_layout"
    storage = container_storage.prefix
    build = f"build --quiet --layers={layers} --isolation chroot --pull=never --build-arg BASE={BASE} --tag {BUILT}"
    commands = [
        [tool("skopeo"), "copy", "--quiet", f"oci:{embedded}", storage + BASE],
        [tool(builder), *container_storage.options, *build.split(), "--file", str(CONTAINERFILE), str(directory)],
        [tool("skopeo"), "copy", "--quiet", storage + BUILT, f"oci:{tmp_path}/built"],
    ]
    for command in commands:
        subprocess.run(command, check=True, timeout=120, capture_output=True)
    ours = package(directory, tmp_path / "ours", reporter=Console("quiet")).layout
    assert unpack(tmp_path / "built", GOARCH) == unpack(ours, GOARCH)


def test_the_default_base_is_named_with_its_version() -> None:
    (line,) = [line for line in CONTAINERFILE.read_text().splitlines() if line.startswith("ARG BASE=")]
    assert line.rpartition(":")[2] != "latest"
