from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gemma_pack.build import default_stem
from gemma_pack.console import Console
from gemma_pack.errors import InvalidUsageError, MachineError
from gemma_pack.record import FileDigest, Record, SourceRecord
from gemma_pack.sources import cache_directory, default_output, demo, obtain
from gemma_pack.sources.outline import outline

if TYPE_CHECKING:
    from gemma_pack.console import Reporter


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Let `demo` write one small file, and return the list of the places where it did."""
    written: list[Path] = []

    def assemble(target: Path, _reporter: Reporter) -> SourceRecord:
        target.mkdir(parents=True)
        (target / "weights").write_bytes(b"w" * 10)
        files = (FileDigest(path="weights", sha256="0" * 64, size_bytes=10),)
        source = SourceRecord(kind="demo", model_id=demo.MODEL_ID, files=files)
        Record(source=source).write(target)
        written.append(target)
        return source

    monkeypatch.setattr(demo, "assemble_demo", assemble)
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path / "cache"))
    return written


def get(model: str, *, revision: str | None = None, output: Path | None = None):
    return obtain(model, revision=revision, output=output, offline=True, reporter=Console("quiet"))


@pytest.mark.parametrize("model", ["nothing", "a/b/c", "/no/such/place", "~/gemma", "google/", "-x/y", ""])
def test_what_is_no_model_is_a_usage_error(model: str):
    with pytest.raises(InvalidUsageError, match="neither demo, nor an existing directory, nor a hub id"):
        get(model)


def test_a_file_is_no_model_and_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "gemma-3-4b-it-Q4_K_M.gguf").write_bytes(b"GGUF")
    model = "models/gemma-3-4b-it-Q4_K_M.gguf"
    for look in (lambda: get(model), lambda: outline(model, offline=True)):
        with pytest.raises(InvalidUsageError, match=f"{model} is a file") as caught:
            look()
        assert "GGUF is not read" in (caught.value.hint or "")


def test_demo_is_demo_beside_a_file_of_that_name(
    small_demo: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("a note")
    assert get("demo").directory == small_demo[0]


def test_a_directory_of_the_library_cache_goes_by_the_models_id(tiny_checkpoint: Path, tmp_path: Path):
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--google--tiny-gemma" / "snapshots" / commit
    shutil.copytree(tiny_checkpoint, snapshot)
    record = get(str(snapshot)).record
    assert (record.kind, record.model_id, record.revision) == ("directory", "google/tiny-gemma", commit)
    assert default_stem(str(snapshot)) == "tiny-gemma"
    assert default_stem(str(snapshot.parent)) == "snapshots"


def test_a_directory_is_used_in_place(tiny_checkpoint: Path, tmp_path: Path):
    source = get(str(tiny_checkpoint))
    assert source.directory == tiny_checkpoint
    assert not source.fetched
    with pytest.raises(InvalidUsageError, match="used in place"):
        get(str(tiny_checkpoint), output=tmp_path / "out")


@pytest.mark.parametrize("model", ["demo", "."])
def test_only_hub_models_have_revisions(model: str):
    with pytest.raises(InvalidUsageError, match="no revisions"):
        get(model, revision="main")


def test_demo_is_found_again_in_the_cache(small_demo: list[Path]):
    first, second = get("demo"), get("demo")
    assert (first.fetched, second.fetched) == (True, False)
    assert first.directory == second.directory
    assert first.directory.is_relative_to(cache_directory())
    assert first.directory.name == "gemma-3-270m"
    assert len(small_demo) == 1


def test_a_truncated_demo_in_the_cache_is_made_again(small_demo: list[Path]):
    (get("demo").directory / "weights").write_bytes(b"w")
    assert get("demo").fetched
    assert len(small_demo) == 2


def test_a_truncated_demo_in_a_directory_of_the_users_is_left_alone(
    small_demo: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    get("demo", output=tmp_path / "mine")
    (tmp_path / "mine" / "weights").write_bytes(b"w")
    monkeypatch.undo()
    with pytest.raises((InvalidUsageError, MachineError)):
        get("demo", output=tmp_path / "mine")
    assert (tmp_path / "mine" / "weights").read_bytes() == b"w"
    assert len(small_demo) == 1


def test_the_cache_is_where_the_variables_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEMMA_PACK_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_directory() == Path("/a")
    monkeypatch.delenv("GEMMA_PACK_CACHE")
    assert cache_directory() == Path("/b/gemma-pack")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_directory() == Path("/c/.cache/gemma-pack")


def test_a_model_goes_by_default_to_a_directory_of_its_name(tmp_path: Path):
    assert default_output("google/gemma-2-9b-it") == Path("gemma-2-9b-it")
    assert default_output("demo") == Path("gemma-3-270m")
    assert default_output(str(tmp_path)) is None


def test_no_source_needs_torch():
    code = (
        "import sys, gemma_pack.sources.pinned, gemma_pack.sources.demo, gemma_pack.sources.directory; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
