"""Modelcar and artifact from one reading: the same bytes as each on its own, and each file read once."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gemma_pack.console import Console
from gemma_pack.errors import CheckpointError, InvalidUsageError, MachineError
from gemma_pack.oci import layers as layers_module
from gemma_pack.oci.compatibility import check_compatibility
from gemma_pack.oci.finding import TAR_READERS
from gemma_pack.oci.package import package
from gemma_pack.oci.package_pair import PackagedPair, package_pair
from gemma_pack.oci.pull import pull
from gemma_pack.oci.push import push
from tests.oci.gemma_images import model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.oci.registry import Registry

QUIET = Console("quiet")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def pack(directory: Path, name: str = "pair", console: Console = QUIET) -> PackagedPair:
    here = directory.parent
    return package_pair(directory, here / f"{name}.oci", here / f"{name}.artifact.oci", reporter=console)


def test_both_are_what_each_is_on_its_own(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint(shards=3, files={"sub/deep/config.json": "[]", "LICENSE": "terms", "empty.txt": ""})
    pair = pack(directory)
    for result, kind in ((pair.modelcar, "modelcar"), (pair.artifact, "artifact")):
        alone = package(directory, directory.parent / kind, kind=kind, reporter=QUIET)  # type: ignore[arg-type]
        assert contents(result.layout) == contents(alone.layout)
        assert result.model_copy(update={"layout": alone.layout}) == alone


def test_each_file_is_read_once(raw_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = raw_checkpoint(shards=3)
    read: dict[str, int] = {}
    right = layers_module.read_file

    def counting(path: Path, size_bytes: int, start: int = 0) -> Iterator[bytes]:
        for chunk in right(path, size_bytes, start):
            read[path.name] = read.get(path.name, 0) + len(chunk)
            yield chunk

    monkeypatch.setattr(layers_module, "read_file", counting)
    pack(directory)
    assert read == {path.name: path.stat().st_size for path in directory.iterdir()}


MEASURE = """
import sys
from pathlib import Path
from gemma_pack.console import Console
from gemma_pack.oci.package_pair import package_pair

def pack(name):
    package_pair(Path(name), Path(name + ".oci"), Path(name + ".artifact.oci"), reporter=Console("quiet"))
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

before = pack(sys.argv[1])
print(pack(sys.argv[2]) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernel_agrees(random_checkpoint: Callable[..., Path]) -> None:
    small, large = random_checkpoint("small", size_bytes=1000), random_checkpoint("large", size_bytes=24 << 20)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert 2 * (24 << 20) < int(output) < 2 * (24 << 20) + (4 << 20)


def test_what_is_there_is_recognized_and_the_other_is_made(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    alone = package(directory, directory.parent / "pair.oci", reporter=QUIET)
    first = pack(directory)
    assert (first.modelcar.already_there, first.artifact.already_there) == (True, False)
    assert first.modelcar.digest == alone.digest
    second = pack(directory)
    assert (second.modelcar.already_there, second.artifact.already_there) == (True, True)
    assert (second.modelcar.digest, second.artifact.digest) == (first.modelcar.digest, first.artifact.digest)


def test_nothing_stays_of_a_pair_that_could_not_be_made(
    raw_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = raw_checkpoint()

    class Meddler(Console):
        def progress(self, *arguments: object, **named: object):  # type: ignore[no-untyped-def, override]
            (directory / "README.md").write_text("longer than before")
            return super().progress(*arguments, **named)  # type: ignore[arg-type]

    with pytest.raises(CheckpointError, match="changed while it was packed"):
        pack(directory, console=Meddler("quiet"))
    (directory.parent / "taken.artifact.oci").write_text("mine")
    with pytest.raises(InvalidUsageError, match="in the way"):
        pack(directory, "taken")
    monkeypatch.setattr("gemma_pack.oci.package_pair.require_space", full_disk)
    with pytest.raises(MachineError):
        pack(directory)
    assert sorted(path.name for path in directory.parent.iterdir()) == ["model", "taken.artifact.oci"]


def full_disk(target: Path, size_bytes: int) -> None:
    raise MachineError(f"{target} has no room for {size_bytes}")


def test_ilab_is_warned_of_directories(raw_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    pack(raw_checkpoint(files={"sub/x.json": "[1]"}), console=Console())
    assert "sub/x.json lies in a directory, which ilab model download does not make" in capsys.readouterr().err


def test_under_two_tags_each_works_for_those_it_is_for(registry: Registry, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for name, data in model().items():
        (directory / name).write_bytes(data)
    pair = pack(directory)
    for result, tag, works in (
        (pair.modelcar, "1", set(TAR_READERS)),
        (pair.artifact, "1-artifact", {"ilab", "modelpack"}),
    ):
        reference = f"{registry.host}/team/gemma:{tag}"
        assert push(result.layout, reference, reporter=QUIET).digest == result.digest
        judgements = check_compatibility(reference).judgements
        assert {one.consumer for one in judgements if one.verdict == "works"} == works
        pull(reference, tmp_path / tag, reporter=QUIET)
        assert contents(tmp_path / tag) == contents(directory)
