from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.oci import journal as journal_module
from gemma_pack.oci.journal import PushJournal, fingerprint, journal_path
from gemma_pack.oci.layers import LayerEntry, LayerSource

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = f"sha256:{'ab' * 32}"
REPOSITORY = "quay.io/team/gemma"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def test_it_outlives_the_process_and_is_private(source: Path):
    with PushJournal.beside(source, REPOSITORY) as journal:
        journal.keep_digest("files", DIGEST)
        journal.keep_session("key", "http://127.0.0.1/a")
        journal.keep_session("key", "http://127.0.0.1/b")
        assert stat.S_IMODE(journal_path(source).stat().st_mode) == 0o600
    with PushJournal.beside(source, REPOSITORY) as journal:
        assert journal.digest("files") == DIGEST
        assert journal.session("key") == "http://127.0.0.1/b"
        journal.keep_session("key", "")
    with PushJournal.beside(source, REPOSITORY) as journal:
        assert journal.session("key") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_another_user_put_there_is_not_believed(source: Path):
    journal_path(source).write_text(f'["digest","files","{DIGEST}"]\n["session","{REPOSITORY}","key","http://evil/"]\n')
    os.chown(journal_path(source), 4242, 4242)
    with PushJournal.beside(source, REPOSITORY) as journal:
        assert journal.digest("files") is None
        assert journal.session("key") is None
        journal.keep_digest("files", DIGEST)
    assert journal_path(source).read_text().count("digest") == 1


def test_a_session_belongs_to_its_repository(source: Path):
    with PushJournal.beside(source, REPOSITORY) as journal:
        journal.keep_session("key", "http://127.0.0.1/a")
    with PushJournal.beside(source, "quay.io/team/other") as journal:
        assert journal.session("key") is None
    with PushJournal.beside(source, REPOSITORY) as journal:
        assert journal.session("key") == "http://127.0.0.1/a"


def test_two_pushes_of_one_source_do_not_share_sessions(source: Path):
    with PushJournal.beside(source, REPOSITORY) as journal:
        journal.keep_session("key", "http://127.0.0.1/a")
        with PushJournal.beside(source, REPOSITORY) as other:
            assert other.session("key") is None
            other.keep_session("key", "http://127.0.0.1/b")
    with PushJournal.beside(source, REPOSITORY) as journal:
        assert journal.session("key") == "http://127.0.0.1/a"


def test_nothing_is_left_where_there_is_nothing_to_remember(source: Path):
    with PushJournal.beside(source, REPOSITORY) as journal:
        journal.keep_session("key", "http://127.0.0.1/a")
        journal.keep_session("key", "")
    assert not journal_path(source).exists()


def test_a_torn_line_is_passed_over_and_the_next_one_is_whole(source: Path):
    with PushJournal.beside(source, REPOSITORY) as journal:
        journal.keep_digest("files", DIGEST)
        journal.keep_digest("others", DIGEST)
    path = journal_path(source)
    path.write_bytes(path.read_bytes()[:-20])
    with PushJournal.beside(source, REPOSITORY) as journal:
        assert (journal.digest("files"), journal.digest("others")) == (DIGEST, None)
        journal.keep_digest("more", DIGEST)
    with PushJournal.beside(source, REPOSITORY) as journal:
        assert (journal.digest("files"), journal.digest("more")) == (DIGEST, DIGEST)


@given(data=st.binary(max_size=300) | st.lists(st.lists(st.text(max_size=5) | st.integers())).map(
    lambda lines: "\n".join(map(json.dumps, lines)).encode()
))  # fmt: skip
def test_any_bytes_are_a_journal(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    source = tmp_path_factory.mktemp("journal") / "model"
    journal_path(source).write_bytes(data)
    with PushJournal.beside(source, REPOSITORY) as journal:
        journal.keep_digest("files", DIGEST)
    with PushJournal.beside(source, REPOSITORY) as journal:
        assert journal.digest("files") == DIGEST


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../x", "sha512:" + "a" * 64])
def test_what_is_no_digest_is_not_one(source: Path, digest: str):
    journal_path(source).write_text(json.dumps(["digest", "files", digest]) + "\n")
    with PushJournal.beside(source, REPOSITORY) as journal:
        assert journal.digest("files") is None


def test_a_journal_does_not_grow_for_ever(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal_module, "MAX_JOURNAL_BYTES", 200)
    journal_path(source).write_bytes(b"x" * 300)
    with PushJournal.beside(source, REPOSITORY) as journal:
        journal.keep_digest("files", DIGEST)
    assert journal_path(source).stat().st_size < 200


def test_a_link_in_its_place_is_not_followed_and_the_push_goes_on(source: Path, tmp_path: Path):
    journal_path(source).symlink_to(tmp_path / "elsewhere")
    with PushJournal.beside(source, REPOSITORY) as journal:
        journal.keep_digest("files", DIGEST)
        assert journal.digest("files") == DIGEST
    assert not (tmp_path / "elsewhere").exists()


def test_a_source_that_cannot_be_written_beside_is_pushed_all_the_same(tmp_path: Path):
    with PushJournal.beside(tmp_path / "absent" / "model", REPOSITORY) as journal:
        journal.keep_digest("files", DIGEST)
        assert journal.digest("files") == DIGEST


@pytest.mark.parametrize("change", ["bytes", "length", "replaced", "touched"])
def test_a_file_that_changed_has_another_fingerprint(tmp_path: Path, change: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    annotations = {"org.opencontainers.image.title": "model.safetensors.tar"}
    layer = LayerSource(
        entries=(LayerEntry(name="models/model.safetensors", source=path, size_bytes=7),), annotations=annotations
    )
    before = fingerprint(layer)
    assert fingerprint(layer) == before
    found = path.stat()
    if change == "bytes":
        path.write_bytes(b"WEIGHTS")
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # ctime tells all the same
    elif change == "length":
        path.write_bytes(b"more weights")
    elif change == "replaced":
        (tmp_path / "new").write_bytes(b"WEIGHTS")
        (tmp_path / "new").replace(path)
    else:
        os.utime(path)
    assert fingerprint(layer) != before
