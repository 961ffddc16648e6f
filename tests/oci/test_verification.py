"""An image is whole, or it is said what is missing, in a registry as in a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gemma_pack.console import Console
from gemma_pack.errors import RegistryError
from gemma_pack.oci.layout import Layout
from gemma_pack.oci.push import push
from gemma_pack.oci.verification import verify
from tests.oci.faulty import Fault, Faulty, Handler, cut_download, quick

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oci.registry import Registry

QUIET = Console("quiet")
MIB = 1 << 20


@pytest.fixture
def pushed(faulty: Faulty, random_layout: Callable[..., Path]) -> str:
    """Return the reference of an image with two layers of 2 MiB in the faulty registry."""
    push(random_layout(size_bytes=2 * MIB), f"{faulty.host}/team/gemma:1", reporter=QUIET)
    faulty.seen.clear()
    return f"{faulty.host}/team/gemma:1"


def largest(faulty: Faulty) -> tuple[str, str]:
    return max(faulty.blobs, key=lambda key: len(faulty.blobs[key]))


@pytest.mark.parametrize("full", [False, True])
def test_a_whole_image_is_whole(registry: Registry, random_layout: Callable[..., Path], full: bool):
    layout = random_layout(size_bytes=MIB)
    result = push(layout, f"{registry.host}/team/gemma:1", reporter=QUIET)
    manifests = Layout.open(layout).manifests()
    blobs = {blob.digest: blob.size_bytes for _, one in manifests for blob in (one.config, *one.layers)}
    for image in (layout, result.reference, result.pinned):
        found = verify(image, full=full, reporter=QUIET)
        found.require_whole()
        assert (found.manifests, found.blobs, found.size_bytes) == (2, len(blobs), sum(blobs.values()))
        assert found.hashed_bytes == (found.size_bytes if full else 0)
        assert found.digest == result.digest


def test_only_sizes_are_asked_for_unless_all_is_to_be_hashed(faulty: Faulty, pushed: str):
    verify(pushed, reporter=QUIET)
    assert faulty.count("GET", "/blobs/") == 0
    assert faulty.count("HEAD", "/blobs/") == len(faulty.blobs)
    verify(pushed, full=True, reporter=QUIET)
    assert faulty.count("GET", "/blobs/") == len(faulty.blobs)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda _: None, "is missing"),
        (lambda data: data[:-1], "has .* bytes, not "),
        (lambda data: data[:-1] + b"?", "have another digest"),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_a_blob_that_is_gone_short_or_damaged_is_named(
    faulty: Faulty, pushed: str, full: bool, damage: Callable[[bytes], bytes | None], problem: str
):
    key = largest(faulty)
    changed = damage(faulty.blobs.pop(key))
    if changed is not None:
        faulty.blobs[key] = changed
    found = verify(pushed, full=full, retry=quick(1), reporter=QUIET)
    if problem == "have another digest" and not full:
        assert found.problems == ()  # what only reading can tell
        return
    (said,) = found.problems
    assert key[1] in said
    with pytest.raises(RegistryError, match=problem):
        found.require_whole()
    assert found.hashed_bytes == 0


def test_all_that_is_missing_is_said(faulty: Faulty, pushed: str):
    count = len(faulty.blobs)
    faulty.blobs.clear()
    found = verify(pushed, reporter=QUIET)
    assert len(found.problems) == count
    with pytest.raises(RegistryError, match=f"and {count - 1} more"):
        found.require_whole()


def test_a_manifest_that_is_missing_or_damaged_is_an_error(faulty: Faulty, pushed: str):
    key = next(
        key for key in faulty.manifests if key[1].startswith("sha256:") and b"layers" in faulty.manifests[key][1]
    )
    kept = faulty.manifests.pop(key)
    with pytest.raises(RegistryError, match="has no image"):
        verify(pushed, reporter=QUIET)
    faulty.manifests[key] = (kept[0], kept[1] + b" ")
    with pytest.raises(RegistryError, match="sent other bytes"):
        verify(pushed, reporter=QUIET)


def test_a_blob_that_breaks_off_is_gone_on_with(faulty: Faulty, pushed: str):
    faulty.faults = [Fault("GET", "blobs/sha256", cut_download(300_000), times=3)]
    verify(pushed, full=True, retry=quick(), reporter=QUIET).require_whole()
    assert any("Range" in seen.headers for seen in faulty.seen)
    faulty.faults = [Fault("GET", "blobs/sha256", cut_download(300_000), times=999)]
    with pytest.raises(RegistryError):
        verify(pushed, full=True, retry=quick(2), reporter=QUIET)


def test_a_registry_that_knows_no_ranges_is_hashed_all_the_same(faulty: Faulty, pushed: str):
    def whole(request: Handler) -> None:
        del request.headers["Range"]
        request._route(request.path, {})

    cut = Fault("GET", largest(faulty)[1], cut_download(300_000))
    faulty.faults = [cut, Fault("GET", "blobs/sha256", whole, times=99)]
    verify(pushed, full=True, retry=quick(), reporter=QUIET).require_whole()


def test_a_damaged_layout_is_said_to_be(random_layout: Callable[..., Path]):
    layout = random_layout(size_bytes=MIB)
    blob = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(b"?" + blob.read_bytes()[1:])
    assert not verify(layout, reporter=QUIET).problems
    assert "another digest" in verify(layout, full=True, reporter=QUIET).problems[0]
    blob.unlink()
    assert "is missing" in verify(layout, reporter=QUIET).problems[0]
