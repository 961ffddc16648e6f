"""Pulling an artifact of raw files: as safe, and as patient, as pulling an image."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pytest

from gemma_pack.commands import run
from gemma_pack.console import Console
from gemma_pack.errors import InvalidUsageError, RegistryError
from gemma_pack.oci.artifact import ARTIFACT_CONFIG_TYPE, ARTIFACT_TYPE
from gemma_pack.oci.layout import create_layout
from gemma_pack.oci.manifest import MANIFEST_TYPE, Descriptor, Manifest, describe
from gemma_pack.oci.package import package
from gemma_pack.oci.pull import pull
from gemma_pack.oci.push import push
from gemma_pack.oci.raw_files import RawExtraction, raw_paths
from tests.oci.faulty import Fault, Faulty, Handler, cut_download, quick, say
from tests.oci.killed_pull import finish_killed_pull

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.oci.registry import Registry

QUIET = Console("quiet")
MIB = 1 << 20
RAW = "application/vnd.cncf.model.weight.v1.raw"
TITLE = "org.opencontainers.image.title"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}"))


def layer(data: bytes, **annotations: str) -> Descriptor:
    return describe(data, RAW, annotations=annotations)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    return tmp_path / "there" / "gemma"


@pytest.fixture
def artifact(tmp_path: Path, random_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes a checkpoint with these files, and its artifact as a layout beside it."""

    def write(name: str = "model", *, files: dict[str, str] | None = None, size_bytes: int = 2 * MIB) -> Path:
        directory = random_checkpoint(name, size_bytes=size_bytes)
        for path, text in (files or {}).items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text)
        return package(directory, tmp_path / f"{name}.artifact.oci", kind="artifact", reporter=QUIET).layout

    return write


@pytest.fixture
def pushed(faulty: Faulty, artifact: Callable[..., Path]) -> str:
    """Return the reference of an artifact with two shards of 2 MiB in the faulty registry."""
    push(artifact(), f"{faulty.host}/team/raw:1", reporter=QUIET)
    faulty.seen.clear()
    return f"{faulty.host}/team/raw:1"


@pytest.fixture
def forged(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a layout whose artifact has exactly these layers."""

    def write(layers: Sequence[tuple[bytes, dict[str, str]]]) -> Path:
        with create_layout(tmp_path / "forged.oci") as writer:
            writer.write_document(b"{}")
            for data, _ in layers:
                writer.write_document(data)
            manifest = Manifest(
                config=describe(b"{}", ARTIFACT_CONFIG_TYPE),
                layers=tuple(layer(data, **annotations) for data, annotations in layers),
                artifact_type=ARTIFACT_TYPE,
            ).encode()
            writer.write_document(manifest)
            writer.add_image(describe(manifest, MANIFEST_TYPE, artifact_type=ARTIFACT_TYPE))
        return tmp_path / "forged.oci"

    return write


def test_what_was_pushed_comes_back_byte_by_byte(
    registry: Registry, artifact: Callable[..., Path], target: Path, tmp_path: Path
):
    files = {"sub/deep/config.json": "{}", "twin.json": '{"same": 1}', "sub/twin.json": '{"same": 1}', "empty": ""}
    layout = artifact(files=files)
    result = push(layout, f"{registry.host}/team/raw:1", reporter=QUIET)
    pulled = pull(result.reference, target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")
    assert (pulled.digest, pulled.files) == (result.digest, len(contents(target)))
    assert {path.stat().st_mode & 0o777 for path in target.rglob("*") if path.is_file()} == {0o644}
    assert leftovers(target) == [".gemma.pulled.json"]
    assert pull(result.reference, target, reporter=QUIET).already_there
    pull(layout, target.with_name("from-layout"), reporter=QUIET)
    assert contents(target.with_name("from-layout")) == contents(target)


def test_a_connection_cut_anywhere_goes_on_where_it_was(faulty: Faulty, pushed: str, target: Path, tmp_path: Path):
    faulty.faults = [Fault("GET", "blobs/sha256", cut_download(300_000), times=4), Fault("GET", "blobs", say(502))]
    result = pull(pushed, target, retry=quick(), reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")
    assert result.downloaded_bytes == sum(map(len, set(contents(target).values())))  # two files are one blob
    starts = {seen.headers["Range"] for seen in faulty.seen if "Range" in seen.headers}
    assert len(starts) >= 2


def test_what_an_earlier_try_left_is_gone_on_from(faulty: Faulty, pushed: str, target: Path, tmp_path: Path):
    faulty.faults = [Fault("GET", "blobs/sha256", cut_download(1 * MIB), times=99)]
    with pytest.raises(RegistryError):
        pull(pushed, target, retry=quick(1), reporter=QUIET)
    assert not target.exists()
    finished = sum(path.stat().st_size for path in target.parent.rglob("*.raw/file"))  # small ones may get through
    faulty.faults = []
    result = pull(pushed, target, reporter=QUIET)
    assert result.resumed_bytes >= 1 * MIB
    blobs = set(contents(target).values())  # two files are one blob
    assert finished + result.resumed_bytes + result.downloaded_bytes == sum(map(len, blobs))
    assert contents(target) == contents(tmp_path / "model")


def test_a_file_damaged_on_the_way_is_fetched_again_and_one_damaged_there_is_an_error(
    faulty: Faulty, pushed: str, target: Path, tmp_path: Path
):
    digest, data = max(((digest, data) for (_, digest), data in faulty.blobs.items()), key=lambda found: len(found[1]))

    def damaged(request: Handler) -> None:
        request.answer(200, {}, b"?" + data[1:])

    faulty.faults = [Fault("GET", digest, damaged)]
    pull(pushed, target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")
    faulty.blobs["team/raw", digest] = b"?" + data[1:]
    with pytest.raises(RegistryError, match=r"is damaged: its bytes are not those of sha256:"):
        pull(pushed, target.with_name("again"), reporter=QUIET)
    assert not target.with_name("again").exists()


@pytest.mark.parametrize("length", [-1, 1])
def test_a_file_of_another_length_is_an_error(faulty: Faulty, pushed: str, target: Path, length: int):
    key = max(faulty.blobs, key=lambda found: len(faulty.blobs[found]))
    faulty.blobs[key] = faulty.blobs[key][:-1] if length < 0 else faulty.blobs[key] + b"x"
    with pytest.raises(RegistryError, match=r"has more than|ended after"):
        pull(pushed, target, retry=quick(2), reporter=QUIET)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil", "leaves the image"),
        ("a/../../../evil", "leaves the image"),
        ("/etc/evil", "leaves the image"),
        ("dir/", "leaves the image"),
        (".", "cannot be used"),
        (".wh.config.json", "deletes files"),
        ("a\nb", "cannot be used"),
        ("x" * 300, "cannot be used"),
        ("", "no title"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_fetched(
    forged: Callable[..., Path], target: Path, tmp_path: Path, name: str, message: str
):
    layout = forged([(b"{}", {TITLE: "config.json"}), (b"evil", {TITLE: name})])
    before = contents(tmp_path)
    with pytest.raises(RegistryError, match=message):
        pull(layout, target, reporter=QUIET)
    after = {name: data for name, data in contents(tmp_path).items() if name != "there/.gemma.pull/lock"}
    assert after == before


def test_a_file_has_one_name_and_a_name_one_file():
    def paths(*layers: Descriptor) -> dict[str, list[PurePosixPath]]:
        return raw_paths(Manifest(config=describe(b"{}", ARTIFACT_CONFIG_TYPE), layers=layers), "it")

    same = {TITLE: "sub/a", "org.cncf.model.filepath": "sub/a"}
    assert list(paths(layer(b"1", **same)).values()) == [[PurePosixPath("sub/a")]]
    with pytest.raises(RegistryError, match="two names, 'a' and 'b'"):
        paths(layer(b"1", **{TITLE: "a", "org.cncf.model.filepath": "b"}))
    with pytest.raises(RegistryError, match="holds sub/a twice"):
        paths(layer(b"1", **same), layer(b"2", **{TITLE: "sub//a"}))
    with pytest.raises(RegistryError, match="more than 10000 files"):
        paths(*(layer(str(number).encode(), **{TITLE: str(number)}) for number in range(10_001)))


def test_one_name_for_a_file_and_a_directory_is_refused(forged: Callable[..., Path], target: Path):
    layout = forged([(b"1", {TITLE: "a"}), (b"2", {TITLE: "a/b"})])
    with pytest.raises(RegistryError, match="both as a file and as a directory"):
        pull(layout, target, reporter=QUIET)
    assert not target.exists()


def test_a_file_that_moved_to_another_name_is_kept_and_gets_the_new_one(
    faulty: Faulty, artifact: Callable[..., Path], target: Path, tmp_path: Path
):
    reference = f"{faulty.host}/team/raw:1"
    push(artifact(files={"old.bin.json": "x" * 5000}), reference, reporter=QUIET)
    faulty.faults = [Fault("GET", "blobs/sha256", say(500), after=4, times=99)]
    with pytest.raises(RegistryError):
        pull(reference, target, retry=quick(1), reporter=QUIET)
    faulty.faults = []
    (tmp_path / "model" / "old.bin.json").rename(tmp_path / "model" / "new.bin.json")
    layout = package(tmp_path / "model", tmp_path / "moved.oci", kind="artifact", reporter=QUIET).layout
    push(layout, reference, reporter=QUIET)
    result = pull(reference, target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")
    assert result.downloaded_bytes < result.size_bytes


def test_too_much_of_an_earlier_try_is_thrown_away(tmp_path: Path):
    with RawExtraction(tmp_path, layer(b"12345"), "it") as extraction:
        extraction.write(b"123")
    (partial,) = tmp_path.glob("*.raw.partial/file")
    partial.write_bytes(b"123456")
    with RawExtraction(tmp_path, layer(b"12345"), "it") as extraction:
        assert extraction.restore() == 0
        extraction.write(b"12345")
        assert extraction.finish()
    assert (extraction.done / "file").read_bytes() == b"12345"


def test_two_pulls_to_one_place_do_not_mix(faulty: Faulty, pushed: str, target: Path):
    def another(request: Handler) -> None:
        with pytest.raises(InvalidUsageError, match="another pull"):
            pull(pushed, target, reporter=QUIET)
        say(500)(request)

    faulty.faults = [Fault("GET", "blobs", another)]
    pull(pushed, target, retry=quick(), reporter=QUIET)
    assert faulty.faults[0].times == 0


@pytest.mark.parametrize("moment", ["while writing", "between the files", "before the name"])
def test_a_pull_killed_at_any_moment_is_finished_by_the_same_command(
    registry: Registry, artifact: Callable[..., Path], tmp_path: Path, target: Path, moment: str
):
    reference = f"{registry.host}/team/raw:1"
    push(artifact(size_bytes=8 * MIB, files={"a.json": "{}", "b.json": "{}"}), reference, reporter=QUIET)
    victim = {
        "while writing": "import gemma_pack.oci.raw_files as m; place, name, count = m.RawExtraction, '_count', 40",
        "between the files": "import gemma_pack.oci.pull as place; name, count = 'place_raw', 4",
        "before the name": "import gemma_pack.oci.pull as place; name, count = 'publish', 1",
    }[moment]
    result = finish_killed_pull(victim, reference, target)
    assert contents(target) == contents(tmp_path / "model")
    assert leftovers(target) == [".gemma.pulled.json"]
    if moment != "while writing":
        assert result["downloaded_bytes"] == 0


def test_the_command_brings_it(pushed: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["pull", pushed, "-o", str(target), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == len(contents(tmp_path / "model"))
