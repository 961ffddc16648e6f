"""Who takes part in bench/transfer.py, and with which commands: each at its best settings for uncompressed weights.

buildah and podman get the overlay driver, which copies least, and the project's Containerfile, with a layer for every
few shards. Podman 4 can only push gzipped layers, and buildah 1.28 does, in spite of its option: what buildah built is
pushed by skopeo. olot writes into a copy of the same base image that gemma-pack takes. skopeo gets --preserve-digests
in both directions, without which it gzips the weights. oci-modelcar's image has no base, so KServe's modelcar mode
does not start it, and oras-py's artifact is no image at all.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
CONTAINERFILE = HERE.parent / "Containerfile.modelcar"
BASE = "localhost/base:bench"
BUILT = "localhost/built:bench"
DRIVER = "overlay"
OURS = "gemma-pack"


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
    """Layers into a copy of the base's layout, then skopeo."""
    layout = place.scratch / "layout"
    return [
        ["skopeo", "copy", "--quiet", "--all", f"oci:{embedded_base()}", f"oci:{layout}:latest"],
        [place.peers / "bin/olot", layout, *sorted(place.model.iterdir())],
        ["skopeo", "copy", "--quiet", "--all", "--preserve-digests", "--dest-tls-verify=false",
         f"oci:{layout}:latest", f"docker://{place.reference}"],
    ]  # fmt: skip


def buildah(place: Place) -> Steps:
    """The project's Containerfile, then skopeo."""
    push = ["skopeo", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false", _stored(place, BUILT)]
    return [*_built(place, "buildah"), [*push, f"docker://{place.reference}"]]


def podman(place: Place) -> Steps:
    """The project's Containerfile."""
    push = ["podman", *_store(place), "push", "--quiet", "--tls-verify=false", BUILT, f"docker://{place.reference}"]
    return [*_built(place, "podman"), push]


def _built(place: Place, builder: str) -> Steps:
    build = ["build", "--quiet", "--layers=true", "--isolation", "chroot", "--pull=never", "--build-arg"]
    return [
        ["skopeo", "copy", "--quiet", f"oci:{embedded_base()}", _stored(place, BASE)],
        [builder, *_store(place), *build, f"BASE={BASE}", "--tag", BUILT, "--file", CONTAINERFILE, place.model],
    ]


def _store(place: Place) -> list[object]:
    return ["--root", place.scratch / "root", "--runroot", place.scratch / "run", "--storage-driver", DRIVER]


def _stored(place: Place, name: str) -> str:
    return f"containers-storage:[{DRIVER}@{place.scratch}/root+{place.scratch}/run]{name}"


def oci_modelcar(place: Place) -> Steps:
    """Its own pipeline, with a worker for each of two cores."""
    script = HERE / "peers/oci_modelcar_directory.py"
    return [[place.peers / "bin/python", script, place.model, place.host, "bench/model", "1", place.scratch / "spool"]]


def oras(place: Place) -> Steps:
    """An artifact of raw files."""
    return [[place.peers / "bin/python", HERE / "peers/oras_directory.py", place.model, place.reference]]


def floor(place: Place) -> Steps:
    """Read, hash and send over loopback; the other end drops it."""
    return [[sys.executable, HERE / "floor.py", place.model]]


def floor_written(place: Place) -> Steps:
    """The same, and the other end writes it to the disk, where it counts as extra disk."""
    (place.scratch / "sink").mkdir()
    return [[sys.executable, HERE / "floor.py", place.model, place.scratch / "sink"]]


def pull_ours(place: Place) -> Steps:
    """gemma-pack, into a directory."""
    return [[sys.executable, "-m", "gemma_pack", "pull", place.reference, "-o", place.scratch / "model", "--quiet"]]


def pull_skopeo(place: Place) -> Steps:
    """Skopeo into a layout, then every layer through tar."""
    layout = place.scratch / "layout"
    return [
        ["skopeo", "copy", "--quiet", "--preserve-digests", "--src-tls-verify=false", f"docker://{place.reference}",
         f"oci:{layout}:latest"],
        [sys.executable, "-c", _UNPACK, layout, place.scratch / "model"],
    ]  # fmt: skip


_UNPACK = """
import json, pathlib, subprocess, sys
layout, target = map(pathlib.Path, sys.argv[1:])
def blob(digest): return layout / "blobs" / digest.replace(":", "/")
target.mkdir()
(entry,) = json.loads((layout / "index.json").read_text())["manifests"]
for layer in json.loads(blob(entry["digest"]).read_text())["layers"]:
    subprocess.run(["tar", "-xf", blob(layer["digest"]), "-C", target], check=True)
"""

PUSHES: dict[str, Callable[[Place], Steps]] = {
    "olot": olot,
    "buildah": buildah,
    "podman": podman,
    "oci-modelcar": oci_modelcar,
    "oras-py": oras,
    "floor": floor,
    "floor, written": floor_written,
}
EQUAL = ("olot", "buildah", "podman")
"""Those that make an image with a base and the files under /models."""


def embedded_base() -> Path:
    """Return the layout of the base image that gemma-pack puts under the weights."""
    import modelcar_base_image

    return Path(modelcar_base_image.__file__).parent / "embedded_oci_layout"
