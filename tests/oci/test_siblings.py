from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.console import Console
from gemma_pack.oci import siblings as siblings_module
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.layers import LayerSource, plan_layers
from gemma_pack.oci.push import push
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.siblings import Siblings
from tests.oci.faulty import Fault, Faulty, Handler, quick, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

QUIET = Console("quiet")
SHARD_BYTES = 200_000


@pytest.fixture
def client(faulty: Faulty) -> Iterator[RegistryClient]:
    with RegistryClient(parse_reference(f"{faulty.host}/a/b:1"), retry=quick()) as client:
        yield client


@pytest.fixture
def model(faulty: Faulty, random_checkpoint: Callable[..., Path]) -> Path:
    """Write a checkpoint of two shards and push it as tag 1."""
    directory = random_checkpoint(size_bytes=SHARD_BYTES)
    push(directory, f"{faulty.host}/a/b:1", reporter=QUIET)
    return directory


def weights(directory: Path) -> list[LayerSource]:
    return [layer for layer in plan_layers(Checkpoint.open(directory)) if "safetensors" in layer.title]


def change(path: Path, place: int) -> None:
    """Change bytes of a file, around one of the places at which layers are compared or wherever `place` says."""
    data = bytearray(path.read_bytes())
    for position in range(max(0, place - 2000), min(len(data), place + 2000)):
        data[position] ^= 1
    path.write_bytes(data)


def test_a_layer_that_is_there_is_recognized_by_a_few_kilobytes(model: Path, client: RegistryClient, faulty: Faulty):
    before = len(faulty.seen)
    siblings = Siblings.find([client], "2")
    assert [siblings.may_hold(layer) for layer in weights(model)] == [True, True]
    ranges = [seen.headers["Range"] for seen in faulty.seen[before:] if "Range" in seen.headers]
    sizes = [int(end) - int(start) + 1 for start, end in (text.removeprefix("bytes=").split("-") for text in ranges)]
    assert 0 < sum(sizes) <= 2 * (siblings_module.SAMPLES + 1) * siblings_module.SAMPLE_BYTES


def test_a_layer_of_the_same_size_and_other_bytes_is_not_there(model: Path, client: RegistryClient):
    (shard, _) = sorted(model.glob("*.safetensors"))
    for place in range(4000, SHARD_BYTES, 4000):
        change(shard, place)
    assert [Siblings.find([client], "2").may_hold(layer) for layer in weights(model)] == [False, True]


def test_what_samples_do_not_show_the_digest_does(model: Path, faulty: Faulty):
    (shard, _) = sorted(model.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = push(model, f"{faulty.host}/a/b:2", reporter=QUIET)
    assert SHARD_BYTES <= result.uploaded_bytes < 1.1 * SHARD_BYTES
    assert push(model, f"{faulty.host}/a/b:3", reporter=QUIET).uploaded_bytes == 0


def test_a_registry_without_ranges_is_asked_by_digest(model: Path, client: RegistryClient, faulty: Faulty):
    def whole(request: Handler) -> None:
        del request.headers["Range"]
        request._route(request.path, {})

    faulty.faults = [Fault("GET", "blobs/sha256", whole, times=99)]
    assert all(Siblings.find([client], "2").may_hold(layer) for layer in weights(model))


@pytest.mark.parametrize("status", [401, 403, 404, 405, 500])
@pytest.mark.parametrize("path", ["tags/list", "manifests/1", "blobs/sha256"])
def test_what_cannot_be_read_is_no_obstacle(
    faulty: Faulty, random_checkpoint: Callable[..., Path], model: Path, path: str, status: int
):
    del model
    other = random_checkpoint("other", size_bytes=1000)
    faulty.faults = [Fault("GET", path, say(status), times=4)]
    assert push(other, f"{faulty.host}/a/b:2", retry=quick(), reporter=QUIET).size_bytes


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"tags": null}', b'{"tags": [1, "../x", "a b"]}', b"\xff"])
def test_a_list_of_tags_that_is_none_is_no_obstacle(
    faulty: Faulty, random_checkpoint: Callable[..., Path], body: bytes
):
    faulty.faults = [Fault("GET", "tags/list", say(200, {}, body))]
    assert push(random_checkpoint(size_bytes=1000), f"{faulty.host}/a/b:2", reporter=QUIET).shared_with is None


def test_a_second_variant_moves_only_its_own_bytes_and_says_with_which_it_shares(
    faulty: Faulty, random_checkpoint: Callable[..., Path], model: Path, tmp_path: Path
):
    del model
    variant = random_checkpoint("variant", size_bytes=SHARD_BYTES)
    untouched, own = sorted(variant.glob("*.safetensors"))
    untouched.write_bytes((tmp_path / "model" / untouched.name).read_bytes())
    result = push(variant, f"{faulty.host}/a/b:2", reporter=QUIET)
    assert own.stat().st_size < result.uploaded_bytes < 1.2 * own.stat().st_size
    assert result.shared_bytes == result.existed_bytes > SHARD_BYTES
    assert result.shared_with == "1"


def test_a_second_variant_of_another_repository_is_mounted_from_it(
    faulty: Faulty, random_checkpoint: Callable[..., Path], model: Path, tmp_path: Path
):
    del model
    variant = random_checkpoint("variant", size_bytes=SHARD_BYTES)
    untouched, _ = sorted(variant.glob("*.safetensors"))
    untouched.write_bytes((tmp_path / "model" / untouched.name).read_bytes())
    result = push(variant, f"{faulty.host}/c/d:2", mount_from=["a/b"], reporter=QUIET)
    assert result.mounted_bytes == result.shared_bytes > SHARD_BYTES
    assert result.shared_with == "a/b:1"


def test_of_many_images_only_some_are_asked_and_the_same_tag_first(
    model: Path, faulty: Faulty, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(siblings_module, "MAX_SIBLINGS", 3)
    for number in range(10):
        faulty.manifests["a/b", f"z{number}"] = faulty.manifests["a/b", "1"]
    faulty.seen.clear()
    siblings = Siblings.find([client], "1")
    asked = {seen.path.rpartition("/")[2] for seen in faulty.seen if "manifests/" in seen.path}
    assert {name for name in asked if ":" not in name} == {"1", "z9", "z8"}
    digests = [digest for _, digest in faulty.blobs]
    assert siblings.most_shared(digests)[0] == "1"
    assert siblings.most_shared([]) == ("", 0)
    del model


def test_nothing_is_read_of_the_files_where_no_size_agrees(client: RegistryClient, model: Path):
    siblings = Siblings.find([client], "1")
    absent = [LayerSource(entries=layer.entries[:-1], annotations=layer.annotations) for layer in weights(model)]
    assert not any(siblings.may_hold(layer) for layer in absent)
