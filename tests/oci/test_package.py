"""Packaging: a layout appears whole or not at all, from one read of each file, in little memory."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.console import Console
from gemma_pack.errors import CheckpointError, InvalidUsageError, MachineError, RegistryError
from gemma_pack.oci.base import BaseChoice
from gemma_pack.oci.layout import Layout
from gemma_pack.oci.manifest import Platform
from gemma_pack.oci.package import PackageResult, package

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

QUIET = Console("quiet")


class Meddler:
    """A reporter under which something happens when the first bytes have been packed."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self.meddle = meddle
        self.total = 0.0

    def status(self, message: str) -> None:
        raise AssertionError(message)

    warn = status

    @contextmanager
    def progress(self, label: str, total: float | None, unit: str = "steps") -> Iterator[Meddler]:
        assert (label, unit) == ("packaging image.oci", "bytes")
        assert total
        self.expected = total
        yield self

    def advance(self, amount: float = 1) -> None:
        self.total += amount
        self.meddle()

    def note(self, text: str) -> None:
        raise AssertionError(text)


def pack(directory: Path, **options: Any) -> PackageResult:
    return package(directory, directory.parent / "image.oci", reporter=options.pop("reporter", QUIET), **options)


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.parent.iterdir() if path != directory)


def test_the_layout_holds_what_the_result_says(
    raw_checkpoint: Callable[..., Path], valid_oci: Callable[[str, Any], None]
) -> None:
    directory = raw_checkpoint(files={"sub/notes.json": "{}"})
    result = pack(directory)
    layout = Layout.open(result.layout)
    assert (layout.root.digest, result.already_there) == (result.digest, False)
    assert result.platforms == ("linux/amd64", "linux/arm64")
    blobs = {path.name: path.read_bytes() for path in (result.layout / "blobs/sha256").iterdir()}
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in blobs.items())
    assert sum(map(len, blobs.values())) == result.size_bytes
    for layer in result.layers:
        assert len(blobs[layer.digest.removeprefix("sha256:")]) == layer.size_bytes
    packed = [name for layer in result.layers for name in layer.files]
    assert sorted(packed) == sorted(
        f"models/{path.relative_to(directory).as_posix()}" for path in directory.rglob("*") if path.is_file()
    )
    valid_oci("image-layout", json.loads((result.layout / "oci-layout").read_text()))
    valid_oci("image-index", json.loads((result.layout / "index.json").read_text()))
    assert leftovers(directory) == ["image.oci"]


def test_progress_counts_every_byte_of_the_layers(raw_checkpoint: Callable[..., Path]) -> None:
    reporter = Meddler(lambda: None)
    result = pack(raw_checkpoint(), reporter=reporter)
    assert reporter.total == reporter.expected == sum(layer.size_bytes for layer in result.layers)


def test_the_same_image_again_is_recognized_and_left_alone(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    first = pack(directory)
    before = {path: path.stat().st_mtime_ns for path in first.layout.rglob("*")}
    second = pack(directory)
    assert second == first.model_copy(update={"already_there": True})
    assert {path: path.stat().st_mtime_ns for path in first.layout.rglob("*")} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda d: (d / "README.md").write_text("# B model\n"),
        lambda d: (d / "README.md").write_text("# Another model\n" * 99),
        lambda d: (d / "more.json").write_text("{}"),
    ],
)
def test_another_image_is_in_the_way(raw_checkpoint: Callable[..., Path], change: Callable[[Path], object]) -> None:
    directory = raw_checkpoint()
    digest = pack(directory).digest
    change(directory)
    with pytest.raises(InvalidUsageError, match="holds another image"):
        pack(directory)
    assert Layout.open(directory.parent / "image.oci").root.digest == digest


def test_the_same_weights_for_other_platforms_are_another_image(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    pack(directory)
    with pytest.raises(InvalidUsageError, match="holds another image"):
        pack(directory, base=BaseChoice(platforms=(Platform("linux", "amd64"),)))


def test_a_damaged_layout_is_not_taken_for_the_image(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    result = pack(directory)
    (result.layout / "blobs/sha256" / result.layers[1].digest.removeprefix("sha256:")).unlink()
    with pytest.raises(InvalidUsageError, match=r"holds this image, but damaged.*lacks the blob"):
        pack(directory)
    (result.layout / "index.json").write_text("{")
    with pytest.raises(InvalidUsageError, match="another image, and it is in the way"):
        pack(directory)


def test_a_flipped_byte_in_a_layout_is_seen(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    result = pack(directory)
    blob = result.layout / "blobs/sha256" / result.layers[0].digest.removeprefix("sha256:")
    data = bytearray(blob.read_bytes())
    data[700] ^= 1
    blob.write_bytes(data)
    with pytest.raises(InvalidUsageError, match=f"damaged: the blob {blob.name} has other bytes"):
        pack(directory)


@pytest.mark.parametrize(
    "block",
    [
        lambda p: p.write_text("mine"),
        lambda p: p.symlink_to("elsewhere"),
        lambda p: (p.mkdir(), (p / "mine").touch()),
    ],
)
def test_what_is_in_the_way_is_not_touched(
    raw_checkpoint: Callable[..., Path], block: Callable[[Path], object]
) -> None:
    directory = raw_checkpoint()
    block(directory.parent / "image.oci")
    with pytest.raises(InvalidUsageError, match="in the way"):
        pack(directory)
    assert leftovers(directory) == ["image.oci"]


def test_an_empty_directory_is_not_in_the_way(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    (directory.parent / "image.oci").mkdir()
    assert Layout.open(pack(directory).layout).manifests()


def test_the_image_does_not_go_into_its_own_input(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    for target in (directory / "image.oci", directory, directory / "sub" / ".." / "x"):
        with pytest.raises(InvalidUsageError, match="inside"):
            package(directory, target, reporter=QUIET)


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    raw_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = raw_checkpoint()
    usage = shutil.disk_usage(directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    with pytest.raises(MachineError, match=r"needs 2\.\d+ MB and the disk has 20\.00 kB free"):
        pack(directory)
    assert not leftovers(directory)


def test_a_file_that_changes_meanwhile_leaves_nothing(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    with pytest.raises(CheckpointError, match=r"README\.md changed while it was packed"):
        pack(directory, reporter=Meddler(lambda: (directory / "README.md").write_text("longer than before")))
    assert not leftovers(directory)


def test_an_interruption_leaves_nothing_and_the_next_run_succeeds(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(directory, reporter=Meddler(interrupt))
    assert not leftovers(directory)
    assert not pack(directory).already_there


def test_a_base_whose_layer_is_damaged_is_refused(
    raw_checkpoint: Callable[..., Path], write_base: Callable[..., Path]
) -> None:
    directory, base = raw_checkpoint(), write_base()
    layer = next(path for path in (base / "blobs/sha256").iterdir() if path.stat().st_size > 5000)
    layer.write_bytes(bytes(layer.stat().st_size - 1) + b"x")
    with pytest.raises(RegistryError, match="the base is damaged"):
        pack(directory, base=BaseChoice(str(base)))
    assert leftovers(directory) == ["base"]


MEASURE = """
import re, sys
from pathlib import Path
from gemma_pack.checkpoint import Checkpoint
from gemma_pack.console import Console
from gemma_pack.oci.package import package

def usage():
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
    return int(io["rchar"]), int(io["wchar"]), int(peak[1]) * 1024

package(Path(sys.argv[1]), Path(sys.argv[1] + ".oci"), reporter=Console("quiet"))  # imports and warms up
before = usage()
package(Path(sys.argv[2]), Path(sys.argv[2] + ".oci"), reporter=Console("quiet"))
print(*(b - a for a, b in zip(before, usage())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_each_byte_is_read_and_written_once_in_little_memory(raw_checkpoint: Callable[..., Path]) -> None:
    small, large = raw_checkpoint("small", shards=2), raw_checkpoint("large", shards=2)
    shard_bytes = 96 << 20
    for shard in large.glob("*.safetensors"):
        elements = shard_bytes // 2
        name = f"layers.{int(shard.name[6:11])}.weight"
        header = json.dumps({name: {"dtype": "BF16", "shape": [elements], "data_offsets": [0, shard_bytes]}}).encode()
        with shard.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + shard_bytes)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    read_bytes, written_bytes, peak_growth_bytes = map(int, output.split())
    slack = 8 << 20
    assert 2 * shard_bytes < read_bytes < 2 * shard_bytes + slack
    assert 2 * shard_bytes < written_bytes < 2 * shard_bytes + slack
    assert peak_growth_bytes < 32 << 20
    assert math.isclose(pack(large.parent / "large").size_bytes, 2 * shard_bytes, rel_tol=0.05)
