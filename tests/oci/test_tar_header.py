"""Tar headers: those of the standard library as it is now, and those of the first image for ever."""

from __future__ import annotations

import hashlib
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.oci.tar_header import BLOCK, DIRECTORY, REGULAR, member_header, padded

names = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=180).map(
    lambda text: "models/" + text.replace("/", "_")
)


@given(name=names, size=st.one_of(st.integers(0, 1 << 20), st.integers((8 << 30) - 2, 1 << 60)))
def test_a_files_header_is_the_one_of_the_standard_library(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    expected = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    assert member_header(name, size, 0o644, REGULAR) == expected


@given(name=names)
def test_a_directorys_header_is_the_one_of_the_standard_library(name: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    assert member_header(name + "/", 0, 0o755, DIRECTORY) == info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def test_the_header_has_not_changed_since_images_were_first_made() -> None:
    # Golden: a change here gives every published image another digest.
    written = member_header("models/" + "x" * 120, 9 << 30, 0o644, REGULAR)
    assert hashlib.sha256(written).hexdigest() == "6dc62649e20fe442062ee63eb708b18650cbbb09cf2de29feddb7d26a60dc26e"


@given(size=st.integers(0, 1 << 40))
def test_padding_fills_the_last_block(size: int) -> None:
    assert 0 <= padded(size) - size < BLOCK
    assert padded(size) % BLOCK == 0
