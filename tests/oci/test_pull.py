from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import threading
import time
from typing import IO, TYPE_CHECKING

import pytest

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.commands import run
from gemma_pack.console import Console
from gemma_pack.errors import CheckpointError, InvalidUsageError, MachineError, OfflineError, RegistryError
from gemma_pack.oci import extraction as extraction_module
from gemma_pack.oci.layout import Layout, create_layout
from gemma_pack.oci.manifest import (
    CONFIG_TYPE,
    GZIP_LAYER_TYPE,
    INDEX_TYPE,
    LAYER_TYPE,
    MANIFEST_TYPE,
    Index,
    Manifest,
    Platform,
    describe,
)
from gemma_pack.oci.pull import pull
from gemma_pack.oci.push import push
from gemma_pack.oci.retry import AnswerError
from tests.oci.faulty import Fault, Faulty, Handler, cut_download, quick, say
from tests.oci.killed_pull import finish_killed_pull

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.oci.registry import Registry

QUIET = Console("quiet")
MIB = 1 << 20


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    return tmp_path / "there" / "gemma"


@pytest.fixture
def pushed(faulty: Faulty, random_layout: Callable[..., Path]) -> str:
    """Return the reference of an image with two weight layers of 2 MiB in the faulty registry."""
    reference = f"{faulty.host}/team/gemma:1"
    push(random_layout(size_bytes=2 * MIB), reference, reporter=QUIET)
    faulty.seen.clear()
    return reference


def tar(files: dict[str, bytes], directory: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        if directory:
            info = tarfile.TarInfo(directory)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a layout whose image has exactly these layers."""

    def write(layers: Sequence[tuple[bytes, str]], platforms: Sequence[str | None] = ("linux/amd64",)) -> Path:
        directory = tmp_path / f"image-{len(list(tmp_path.iterdir()))}.oci"
        with create_layout(directory) as writer:
            writer.write_document(b"{}")
            for data, _ in layers:
                writer.write_document(data)
            manifest = Manifest(
                config=describe(b"{}", CONFIG_TYPE),
                layers=tuple(describe(data, media_type) for data, media_type in layers),
            ).encode()
            writer.write_document(manifest)
            parsed = [text and Platform.parse(text) for text in platforms]
            index = Index(
                manifests=tuple(describe(manifest, MANIFEST_TYPE, platform=platform) for platform in parsed)
            ).encode()
            writer.write_document(index)
            writer.add_image(describe(index, INDEX_TYPE) if platforms else describe(manifest, MANIFEST_TYPE))
        return directory

    return write


def checkpoint_tar(directory: Path, **changed: bytes) -> bytes:
    files = {f"models/{path.name}": path.read_bytes() for path in sorted(directory.iterdir())}
    return tar(files | {f"models/{name.replace('_', '.')}": data for name, data in changed.items()}, "models/")


def test_what_was_pushed_comes_back_byte_by_byte(
    registry: Registry, random_layout: Callable[..., Path], tmp_path: Path, target: Path
):
    reference = f"{registry.host}/team/gemma:1"
    digest = push(random_layout(), reference, reporter=QUIET).digest
    result = pull(reference, target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")
    assert result.digest == digest
    assert result.directory == target
    assert result.files == len(contents(target))
    assert result.size_bytes == sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    assert result.downloaded_bytes > 2 * MIB
    assert not result.already_there
    assert target.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}
    assert leftovers(target) == [".gemma.pulled.json"]
    Checkpoint.open(target).require_tokenizer()


def test_sub_directories_are_kept(faulty: Faulty, raw_checkpoint: Callable[..., Path], target: Path):
    source = raw_checkpoint(files={"original/params.json": "{}"})
    push(source, f"{faulty.host}/a/b:1", reporter=QUIET)
    pull(f"{faulty.host}/a/b:1", target, reporter=QUIET)
    assert contents(target) == contents(source)
    assert (target / "original").stat().st_mode & 0o777 == 0o755


def test_a_layout_on_disk_can_be_pulled_too(random_layout: Callable[..., Path], tmp_path: Path, target: Path):
    result = pull(random_layout(), target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")
    assert result.reference.endswith("model.oci")


def test_the_same_again_does_nothing(faulty: Faulty, pushed: str, target: Path):
    first = pull(pushed, target, reporter=QUIET)
    faulty.seen.clear()
    (target / "report.json").write_text("{}")  # what other commands add is no change of the checkpoint
    second = pull(pushed, target, reporter=QUIET)
    assert second.already_there
    assert (second.digest, second.files, second.size_bytes) == (first.digest, first.files, first.size_bytes)
    assert faulty.count("GET", "blobs") == 0


@pytest.mark.parametrize("change", ["edit", "remove", "retag", "forget"])
def test_another_checkpoint_in_the_way_is_refused_and_left_alone(
    pushed: str, target: Path, change: str, random_layout: Callable[..., Path]
):
    pull(pushed, target, reporter=QUIET)
    if change == "edit":
        (target / "config.json").write_text((target / "config.json").read_text() + " ")
    elif change == "remove":
        (target / "config.json").unlink()
    elif change == "retag":
        push(random_layout("other", size_bytes=1000), pushed, reporter=QUIET)
    else:
        (target.parent / ".gemma.pulled.json").unlink()
    before = contents(target)
    with pytest.raises(InvalidUsageError, match="in the way"):
        pull(pushed, target, reporter=QUIET)
    assert contents(target) == before
    assert ".gemma.pull" not in leftovers(target)


def test_an_empty_directory_is_not_in_the_way(pushed: str, target: Path):
    target.mkdir()
    assert pull(pushed, target, reporter=QUIET).files


def test_a_link_in_the_way_is_not_followed(pushed: str, target: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidUsageError, match="in the way"):
        pull(pushed, target, reporter=QUIET)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("after", [0, 1, 700, MIB + 777, 2 * MIB])
def test_a_connection_cut_anywhere_goes_on_where_it_was(
    faulty: Faulty, pushed: str, target: Path, tmp_path: Path, after: int
):
    faulty.faults = [Fault("GET", "blobs", cut_download(after), times=3)]
    result = pull(pushed, target, retry=quick(), reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")
    ranges = [seen.headers["Range"] for seen in faulty.seen if "Range" in seen.headers]
    assert len(ranges) == (3 if 0 < after < 2 * MIB else len(ranges))
    assert sum(len(data) for (_, digest), data in faulty.blobs.items()) >= result.downloaded_bytes


def test_a_registry_that_knows_no_ranges_is_read_from_the_start(
    faulty: Faulty, pushed: str, target: Path, tmp_path: Path
):
    def whole(request: Handler) -> None:
        del request.headers["Range"]
        request._route(request.path, {})

    faulty.faults = [Fault("GET", "blobs", cut_download(MIB)), Fault("GET", "blobs", whole, times=99)]
    result = pull(pushed, target, retry=quick(), reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")
    faulty.faults = []
    assert result.downloaded_bytes == pull(pushed, target.with_name("other"), reporter=QUIET).downloaded_bytes


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_registry_that_stumbles_is_asked_again(faulty: Faulty, pushed: str, target: Path, status: int):
    faulty.faults = [Fault("GET", path, say(status, body=b"<html>"), times=2) for path in ("manifests", "blobs")]
    assert pull(pushed, target, retry=quick(), reporter=QUIET).files


def test_a_line_that_always_breaks_ends_in_an_error_and_the_rest_comes_later(
    faulty: Faulty, pushed: str, target: Path, tmp_path: Path
):
    faulty.faults = [Fault("GET", "blobs", cut_download(200_000), times=99)]
    with pytest.raises(AnswerError, match=r"ended after|broke"):
        pull(pushed, target, retry=quick(), reporter=QUIET)
    assert not target.exists()
    faulty.faults = []
    result = pull(pushed, target, retry=quick(), reporter=QUIET)
    assert result.resumed_bytes > 200_000
    assert contents(target) == contents(tmp_path / "model")


def test_a_blob_damaged_on_the_way_is_fetched_again(faulty: Faulty, pushed: str, target: Path, tmp_path: Path):
    def damage(request: Handler) -> None:
        repository, digest = "team/gemma", request.path.rpartition("/")[2]
        data = bytearray(request.state.blobs[repository, digest])
        data[len(data) // 2] ^= 1
        request.answer(200, {}, bytes(data))

    faulty.faults = [Fault("GET", "blobs", damage)]
    pull(pushed, target, retry=quick(), reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")


def test_a_blob_damaged_in_the_registry_is_an_error(
    registry: Registry, random_layout: Callable[..., Path], target: Path
):
    reference = f"{registry.host}/team/gemma:1"
    source = random_layout()
    push(source, reference, reporter=QUIET)
    (layer,) = [
        one for one in Layout.open(source).manifests()[0][1].layers if (one.title or "").startswith("model-00001")
    ]
    with registry.blob(layer.digest).open("r+b") as stream:
        stream.seek(MIB)
        stream.write(b"!!!!")
    with pytest.raises(RegistryError, match=r"model-00001.* is damaged"):
        pull(reference, target, retry=quick(), reporter=QUIET)
    assert not target.exists()


@pytest.mark.parametrize(("length", "message"), [(100, "ended after"), (9 * MIB, "more than")])
def test_a_blob_of_another_length_is_an_error(faulty: Faulty, pushed: str, target: Path, length: int, message: str):
    faulty.faults = [Fault("GET", "blobs", say(200, body=bytes(length)), times=99)]
    with pytest.raises(RegistryError, match=f"{message}|no tar|decompress"):
        pull(pushed, target, retry=quick(), reporter=QUIET)
    assert not target.exists()


def test_a_missing_blob_is_an_error(faulty: Faulty, pushed: str, target: Path):
    faulty.blobs.clear()
    with pytest.raises(RegistryError, match="404"):
        pull(pushed, target, retry=quick(), reporter=QUIET)
    assert not target.exists()


def test_a_tag_that_moves_meanwhile_changes_nothing(
    faulty: Faulty, pushed: str, target: Path, tmp_path: Path, random_layout: Callable[..., Path]
):
    push(random_layout("other", size_bytes=1000), f"{faulty.host}/team/gemma:2", reporter=QUIET)

    def move(request: Handler) -> None:
        request.state.manifests["team/gemma", "1"] = request.state.manifests["team/gemma", "2"]
        request._route(request.path, {})

    faulty.faults = [Fault("GET", "manifests/sha256", move)]
    pull(pushed, target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")


def test_a_tag_that_moved_between_two_tries_keeps_only_what_both_images_have(
    faulty: Faulty, pushed: str, target: Path, tmp_path: Path, random_layout: Callable[..., Path]
):
    weights = [key for key, data in faulty.blobs.items() if len(data) > MIB]
    lost = faulty.blobs.pop(weights[1])
    with pytest.raises(RegistryError):
        pull(pushed, target, retry=quick(), reporter=QUIET)
    push(random_layout("other", size_bytes=1000), pushed, reporter=QUIET)
    pull(pushed, target, retry=quick(), reporter=QUIET)
    assert contents(target) == contents(tmp_path / "other")
    assert leftovers(target) == [".gemma.pulled.json"]
    assert lost


def test_a_full_disk_is_a_machine_error_and_the_rest_comes_later(
    pushed: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    left = [MIB]
    write = extraction_module.write_all

    def until_full(stream: IO[bytes], data: bytes) -> None:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(stream.name))
        write(stream, data)

    monkeypatch.setattr(extraction_module, "write_all", until_full)
    assert run(["pull", pushed, "-o", str(target)]) == 12
    assert "no space left on the disk" in capsys.readouterr().err
    assert not target.exists()
    monkeypatch.setattr(extraction_module, "write_all", write)
    assert pull(pushed, target, reporter=QUIET).resumed_bytes > 0
    assert contents(target) == contents(tmp_path / "model")


def test_too_little_room_is_seen_before_anything_is_fetched(
    faulty: Faulty, pushed: str, target: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = type("Usage", (), {"free": MIB})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(MachineError, match="free"):
        pull(pushed, target, reporter=QUIET)
    assert faulty.count("GET", "blobs") == 0


def test_layers_lie_over_one_another_in_order(
    image: Callable[..., Path], random_checkpoint: Callable[..., Path], target: Path
):
    base = checkpoint_tar(random_checkpoint(size_bytes=1000), notes_txt=b"first")
    second, third = tar({"models/notes.txt": b"second"}), tar({"./models/notes.txt": b"third", "models/new": b""})
    for number, (layers, expected) in enumerate([
        ([base, second, third], b"third"),
        ([base, third, second], b"second"),
        ([base, second, third, second], b"second"),
    ]):  # fmt: skip
        place = target.with_name(f"gemma-{number}")
        pull(image([(layer, LAYER_TYPE) for layer in layers]), place, reporter=QUIET)
        assert (place / "notes.txt").read_bytes() == expected


def test_gzipped_layers_of_other_tools_are_read(
    image: Callable[..., Path], random_checkpoint: Callable[..., Path], target: Path
):
    source = random_checkpoint(size_bytes=100_000)
    base = tar({"etc/os-release": b"base", "usr/bin/sh": bytes(50_000)})
    layers = [(gzip.compress(base), "application/vnd.docker.image.rootfs.diff.tar.gzip")]
    layers.append((gzip.compress(checkpoint_tar(source)), GZIP_LAYER_TYPE))
    pull(image(layers), target, reporter=QUIET)
    assert contents(target) == contents(source)


def test_what_skopeo_recompressed_is_read(
    registry: Registry, random_layout: Callable[..., Path], tool: Callable[[str], str], tmp_path: Path, target: Path
):
    reference = f"{registry.host}/team/gemma:1"
    subprocess.run(
        [tool("skopeo"), "copy", "--dest-tls-verify=false", f"oci:{random_layout()}", f"docker://{reference}"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pull(reference, target, reporter=QUIET)
    assert contents(target) == contents(tmp_path / "model")


def test_files_and_directories_of_one_name_are_refused(
    image: Callable[..., Path], random_checkpoint: Callable[..., Path], target: Path
):
    base = checkpoint_tar(random_checkpoint(size_bytes=1000))
    with pytest.raises(RegistryError, match="both as a file and as a directory"):
        pull(image([(base, LAYER_TYPE), (tar({"models/config.json/x": b""}), LAYER_TYPE)]), target, reporter=QUIET)
    assert not target.exists()


@pytest.mark.parametrize("what", ["nothing", "no config", "cut weights"])
def test_what_is_no_whole_checkpoint_never_gets_the_name(
    image: Callable[..., Path], random_checkpoint: Callable[..., Path], target: Path, what: str
):
    source = random_checkpoint(size_bytes=1000)
    if what == "no config":
        (source / "config.json").unlink()
    elif what == "cut weights":
        shard = min(source.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1])
    layer = tar({"etc/x": b""}) if what == "nothing" else checkpoint_tar(source)
    with pytest.raises(CheckpointError, match=r"holds no whole checkpoint: /models"):
        pull(image([(layer, LAYER_TYPE)]), target, reporter=QUIET)
    assert leftovers(target) == []
    assert not target.exists()


@pytest.mark.parametrize("media_type", [LAYER_TYPE + "+zstd", "application/vnd.cncf.model.weight.v1.tar+zstd", "x/y"])
def test_layers_of_other_types_are_refused_before_anything_is_fetched(
    image: Callable[..., Path], target: Path, media_type: str
):
    with pytest.raises(RegistryError, match=r"zstd|neither the tar"):
        pull(image([(tar({}), LAYER_TYPE), (b"x", media_type)]), target, reporter=QUIET)
    assert not target.exists()


def test_a_malicious_layer_leaves_nothing_outside(
    image: Callable[..., Path], random_checkpoint: Callable[..., Path], target: Path, tmp_path: Path
):
    good = checkpoint_tar(random_checkpoint(size_bytes=1000))
    before = contents(tmp_path)
    evil = image([(good, LAYER_TYPE), (tar({"models/../../../evil": b"x"}), LAYER_TYPE)])
    with pytest.raises(RegistryError, match="leaves the image"):
        pull(evil, target, reporter=QUIET)
    inside = {
        name for name in contents(tmp_path) if not name.startswith((".gemma.pull", "there/.gemma.pull", evil.name))
    }
    assert inside == set(before)


def test_the_platform_is_chosen_from_the_index(
    image: Callable[..., Path], random_checkpoint: Callable[..., Path], target: Path
):
    layer = (checkpoint_tar(random_checkpoint(size_bytes=1000)), LAYER_TYPE)
    both = image([layer], ("linux/amd64", "linux/arm64/v8"))
    assert pull(both, target.with_name("a"), reporter=QUIET).files
    assert pull(both, target.with_name("b"), platform=Platform("linux", "arm64"), reporter=QUIET).files
    with pytest.raises(InvalidUsageError, match=r"not for linux/s390x; it is for linux/amd64, linux/arm64/v8"):
        pull(both, target, platform=Platform("linux", "s390x"), reporter=QUIET)
    assert pull(image([layer], (None,)), target.with_name("c"), reporter=QUIET).files
    assert pull(image([layer], ()), target.with_name("d"), reporter=QUIET).files


def test_two_pulls_to_one_place_do_not_mix(faulty: Faulty, pushed: str, target: Path, tmp_path: Path):
    under_way, go_on = threading.Event(), threading.Event()

    def hold(request: Handler) -> None:
        under_way.set()
        go_on.wait(10)
        request._route(request.path, {})

    faulty.faults = [Fault("GET", "blobs", hold)]
    first = threading.Thread(target=lambda: pull(pushed, target, reporter=QUIET))
    first.start()
    assert under_way.wait(10)
    with pytest.raises(InvalidUsageError, match="another pull"):
        pull(pushed, target, reporter=QUIET)
    go_on.set()
    first.join(30)
    assert contents(target) == contents(tmp_path / "model")


def test_nobody_there_is_offline(free_port: int, target: Path):
    with pytest.raises(OfflineError):
        pull(f"127.0.0.1:{free_port}/a/b:1", target, reporter=QUIET)
    assert leftovers(target) == []


def test_a_directory_that_is_no_layout_is_not_taken_for_a_reference(tmp_path: Path, target: Path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(InvalidUsageError, match="is not an OCI layout"):
        pull(str(tmp_path / "plain"), target, reporter=QUIET)


@pytest.mark.parametrize("moment", ["in the layers", "between the layers", "before the name"])
def test_a_pull_killed_at_any_moment_is_finished_by_the_same_command(
    registry: Registry, random_layout: Callable[..., Path], tmp_path: Path, target: Path, moment: str
):
    reference = f"{registry.host}/team/gemma:1"
    push(random_layout(shards=2, size_bytes=24 * MIB), reference, reporter=QUIET)
    victim = {
        "in the layers": "import gemma_pack.oci.extraction as place; name, count = 'write_all', 300",
        "between the layers": "import gemma_pack.oci.pull as place; name, count = '_overlay', 4",
        "before the name": "import gemma_pack.oci.pull as place; name, count = 'publish', 1",
    }[moment]
    result = finish_killed_pull(victim, reference, target)
    assert contents(target) == contents(tmp_path / "model")
    assert leftovers(target) == [".gemma.pulled.json"]
    if moment == "in the layers":
        assert result["resumed_bytes"] > 10 * MIB
    else:
        assert result["downloaded_bytes"] == 0


def test_an_interrupt_stops_at_once_and_keeps_what_came(pushed: str, target: Path):
    class Interrupting:
        def advance(self, amount: float = 1) -> None:
            raise KeyboardInterrupt(amount)

        def note(self, text: str) -> None:
            del text

    class Reporter(Console):
        def progress(self, *_: object, **__: object):  # type: ignore[no-untyped-def, override]
            return contextlib.nullcontext(Interrupting())

    begin_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pull(pushed, target, reporter=Reporter("quiet"))
    assert time.monotonic() - begin_s < 10
    assert not target.exists()
    assert leftovers(target) == [".gemma.pull"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("how", ["theirs", "link"])
def test_layers_that_another_user_left_beside_the_target_are_not_believed(pushed: str, target: Path, how: str):
    staging = target.with_name(f".{target.name}.pull")
    if how == "theirs":
        staging.mkdir(mode=0o777)
        os.chown(staging, 4242, 4242)
    else:
        (target.parent / "elsewhere").mkdir()
        staging.symlink_to(target.parent / "elsewhere")
    with pytest.raises(InvalidUsageError, match="another user"):
        pull(pushed, target, reporter=QUIET)
    assert not target.exists()
    assert not list(staging.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_word_that_the_image_is_there_does_not_count(pushed: str, target: Path):
    pull(pushed, target, reporter=QUIET)
    os.chown(target.with_name(f".{target.name}.pulled.json"), 4242, 4242)
    with pytest.raises(InvalidUsageError, match="in the way"):
        pull(pushed, target, reporter=QUIET)
