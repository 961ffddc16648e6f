"""What Docker's registry, killed in mid-write, leaves in its storage: empty files (distribution's issue 4489)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from gemma_pack.console import Console
from gemma_pack.errors import RegistryError
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.journal import PushJournal
from gemma_pack.oci.layout import Layout
from gemma_pack.oci.manifest import INDEX_TYPE
from gemma_pack.oci.push import push
from gemma_pack.oci.reference import parse_reference
from tests.oci.faulty import quick
from tests.oci.test_kill import tagged

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oci.registry import Registry

QUIET = Console("quiet")
REPOSITORIES = "data/docker/registry/v2/repositories/team/gemma"
PART_BYTES = 100_000


@pytest.fixture
def layout(random_layout: Callable[..., Path]) -> Path:
    return random_layout(shards=1, size_bytes=300_000)


def empty(directory: Path, pattern: str) -> None:
    """Leave nothing in the files that match."""
    found = list(directory.glob(pattern))
    assert found
    for path in found:
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["model", "model.oci"])
@pytest.mark.parametrize(
    "links", ["_layers/*/*/link", "_manifests/revisions/*/*/link", "_manifests/tags/1/current/link", "**/link"]
)
def test_empty_links_are_written_again(registry: Registry, layout: Path, tmp_path: Path, kind: str, links: str):
    reference = f"{registry.host}/team/gemma:1"
    push(tmp_path / kind, reference, reporter=QUIET)
    empty(registry.directory / REPOSITORIES, links)
    push(tmp_path / kind, reference, retry=quick(3), reporter=QUIET)
    assert tagged(registry.host, "team/gemma") == Layout.open(layout).root.digest


def test_a_repository_whose_links_are_empty_is_no_obstacle_to_mounting_from_the_next(registry: Registry, layout: Path):
    for name in ("gemma", "other"):
        push(layout, f"{registry.host}/team/{name}:1", reporter=QUIET)
    empty(registry.directory / REPOSITORIES, "_layers/*/*/link")
    mounts = ["team/gemma", "team/other"]
    result = push(layout, f"{registry.host}/team/new:1", mount_from=mounts, retry=quick(3), reporter=QUIET)
    assert result.mounted_bytes == result.size_bytes
    assert tagged(registry.host, "team/new") == result.digest


@pytest.mark.parametrize("number", [0, -1])
def test_an_empty_manifest_gets_no_tag_and_the_hint_says_what_to_remove(registry: Registry, layout: Path, number: int):
    documents = [descriptor for descriptor, _ in Layout.open(layout).manifests()] + [Layout.open(layout).root]
    assert documents[-1].media_type == INDEX_TYPE
    push(layout, f"{registry.host}/team/gemma:0", reporter=QUIET)
    registry.blob(documents[number].digest).write_bytes(b"")
    with pytest.raises(RegistryError, match="took a manifest and cannot give it back") as caught:
        push(layout, f"{registry.host}/team/gemma:1", retry=quick(3), reporter=QUIET)
    assert tagged(registry.host, "team/gemma") is None
    removed = re.search(r"docker/registry/\S+/data", caught.value.hint or "")
    assert removed
    (registry.directory / "data" / removed[0]).unlink()
    assert push(layout, f"{registry.host}/team/gemma:1", reporter=QUIET).digest == documents[-1].digest
    assert tagged(registry.host, "team/gemma") == documents[-1].digest


@pytest.mark.parametrize("whole", [False, True], ids=["in the middle", "before it closes"])
@pytest.mark.parametrize("state", ["startedat", "hashstates/*/*", "data"])
def test_a_session_whose_state_is_empty_is_begun_again(registry: Registry, layout: Path, state: str, whole: bool):
    image = Layout.open(layout)
    largest = max((blob for _, manifest in image.manifests() for blob in manifest.layers), key=lambda b: b.size_bytes)
    reference = parse_reference(f"{registry.host}/team/gemma:1")
    data = image.require_blob(largest).read_bytes()[: None if whole else PART_BYTES]
    with RegistryClient(reference, writable=True) as client:  # a push that is killed here
        session = client.patch(client.start_upload(), [data], start=0, size_bytes=len(data), ranged=False)
    with PushJournal.beside(layout, f"{reference.host}/{reference.repository}") as journal:
        journal.keep_session(largest.digest, str(session.url))
    empty(registry.directory / REPOSITORIES, f"_uploads/*/{state}")
    push(layout, reference, retry=quick(3), reporter=QUIET)
    assert tagged(registry.host, "team/gemma") == image.root.digest
