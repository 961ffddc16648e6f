from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from gemma_pack.errors import RegistryError
from gemma_pack.oci.body import Blob, CheckedBody
from gemma_pack.oci.manifest import sha256_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MIB = 1 << 20
SIZE = 3 * MIB
DATA = random.Random(0).randbytes(SIZE)  # noqa: S311 - test data


def blob(digest: str | None = None, *, size_bytes: int = SIZE) -> Blob:
    def read() -> Iterator[bytes]:
        return (DATA[first : first + MIB] for first in range(0, SIZE, MIB))

    return Blob(size_bytes=size_bytes, digest=digest, read=read, label="the weights", key="weights")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("starts", [[0], [0, MIB], [0, 0], [5, 4, 3], [SIZE - 1, 0], [MIB + 1], [SIZE]])
def test_a_body_is_read_from_any_offset_and_hashed_from_the_first(starts: Sequence[int], known: bool):
    moved = [0]
    body = CheckedBody(
        blob(sha256_digest(DATA) if known else None), lambda amount: moved.__setitem__(0, moved[0] + amount)
    )
    for start in starts:
        assert b"".join(body.piece(start, SIZE - start)) == DATA[start:]
        assert moved == [SIZE]
    assert body.whole_digest() == sha256_digest(DATA)


def test_a_digest_is_learnt_by_reading_what_was_not_read_yet():
    body = CheckedBody(blob(), lambda _: None)
    assert b"".join(body.piece(0, 10)) == DATA[:10]
    assert body.digest is None
    assert body.whole_digest() == body.digest == sha256_digest(DATA)
    empty = Blob(size_bytes=0, digest=None, read=lambda: iter(()), label="nothing", key="")
    assert CheckedBody(empty, lambda _: None).whole_digest() == sha256_digest(b"")


def test_the_last_piece_of_a_file_that_changed_never_leaves():
    left: list[bytes] = []
    pieces = CheckedBody(blob(sha256_digest(b"other")), lambda _: None).piece(0, SIZE)
    with pytest.raises(RegistryError, match="the weights has changed"):
        left.extend(pieces)
    assert len(b"".join(left)) == SIZE - MIB
    with pytest.raises(RegistryError, match="the weights has changed"):
        CheckedBody(blob(size_bytes=SIZE + 1), lambda _: None).whole_digest()


def test_stopping_ends_a_body():
    body = CheckedBody(blob(), lambda _: None, stop=lambda: True)
    with pytest.raises(RegistryError, match="stopped"):
        next(body.piece(0, SIZE))
