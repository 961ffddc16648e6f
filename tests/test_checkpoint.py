"""Every promise of `Checkpoint.open`: what is damaged, incomplete or contradictory is named, with a remedy."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import safetensors

from gemma_pack.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, file_sha256, read_json, write_index
from gemma_pack.errors import CheckpointError
from gemma_pack.safetensors_file import read_header, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_shard(path: Path, names: str) -> None:
    """Write one tensor of four bytes for each letter of `names`."""
    write_safetensors(path, [(name, "BF16", (1, 2), lambda name=name: name.encode() * 4) for name in names])


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """Return a checkpoint of one file, tensors `a` and `b`."""
    directory = tmp_path / "single"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "gemma3_text"}', "utf-8")
    (directory / "tokenizer.json").write_text("{}", "utf-8")
    write_shard(directory / SINGLE_NAME, "ab")
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a checkpoint of two shards: `a` and `b` in the first, `c` in the second."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "gemma3_text"}', "utf-8")
    write_shard(directory / FIRST, "ab")
    write_shard(directory / SECOND, "c")
    write_index(directory, [*read_header(directory / FIRST), *read_header(directory / SECOND)])
    return directory


def change_index(directory: Path, **weight_map: str | None) -> None:
    path = directory / INDEX_NAME
    index = json.loads(path.read_text("utf-8"))
    for name, shard in weight_map.items():
        if shard is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = shard
    path.write_text(json.dumps(index), "utf-8")


def refusal(directory: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert caught.value.hint, "every refusal has a remedy"
    return caught.value


def test_a_checkpoint_of_one_file(single: Path):
    checkpoint = Checkpoint.open(single)
    assert checkpoint.config == {"model_type": "gemma3_text"}
    assert checkpoint.shards == [single / SINGLE_NAME]
    assert checkpoint.size_bytes == 8
    assert checkpoint.tensors["b"].read() == b"bbbb"
    assert checkpoint.digest("b") == hashlib.sha256(b"bbbb").hexdigest()


def test_a_checkpoint_of_shards(sharded: Path):
    checkpoint = Checkpoint.open(sharded)
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.shards == [sharded / FIRST, sharded / SECOND]
    assert checkpoint.size_bytes == 12


def test_the_index_is_what_transformers_reads(sharded: Path):
    index = json.loads((sharded / INDEX_NAME).read_text("utf-8"))
    assert index == {"metadata": {"total_size": 12}, "weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}}
    for name, shard in index["weight_map"].items():
        with safetensors.safe_open(sharded / shard, framework="numpy") as file:
            assert name in file.keys()  # noqa: SIM118 - not a mapping


def test_one_file_needs_no_index(single: Path):
    write_index(single, read_header(single / SINGLE_NAME))
    assert not (single / INDEX_NAME).exists()


def test_an_index_of_one_file_is_fine(single: Path):
    (single / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": SINGLE_NAME, "b": SINGLE_NAME}}), "utf-8")
    assert sorted(Checkpoint.open(single).tensors) == ["a", "b"]


def test_shards_may_be_links_as_in_the_hub_s_cache(sharded: Path):
    blob = sharded.parent / "blob"
    (sharded / FIRST).rename(blob)
    (sharded / FIRST).symlink_to(blob)
    assert Checkpoint.open(sharded).tensors["a"].read() == b"aaaa"


def no_directory(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def only_pickle(directory: Path) -> None:
    (directory / SINGLE_NAME).rename(directory / "pytorch_model.bin")


def truncate(directory: Path) -> None:
    path = directory / SINGLE_NAME
    path.write_bytes(path.read_bytes()[:-1])


def append(directory: Path) -> None:
    path = directory / SINGLE_NAME
    path.write_bytes(path.read_bytes() + b"1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_directory, "{} is not a directory"),
        (lambda directory: (directory / "config.json").unlink(), "{} has no config.json"),
        (lambda directory: (directory / "config.json").write_text("{'a': 1}", "utf-8"), "{}/config.json is not JSON: "),
        (lambda directory: (directory / "config.json").write_bytes(b'"\xff"'), "{}/config.json is not JSON: "),
        (
            lambda directory: (directory / "config.json").write_text("[" * 100_000, "utf-8"),
            "{}/config.json is not JSON",
        ),
        (
            lambda directory: (directory / "config.json").write_text("[1]", "utf-8"),
            "{}/config.json holds no JSON object",
        ),
        (lambda directory: (directory / SINGLE_NAME).unlink(), "{} has no model.safetensors"),
        (only_pickle, "{} has no model.safetensors"),
        (truncate, "{}/model.safetensors is truncated: "),
        (append, "{}/model.safetensors has bytes after its last tensor: "),
        (lambda directory: (directory / SINGLE_NAME).write_bytes(b"{}"), "{}/model.safetensors is truncated or no "),
    ],
)
def test_damage_to_one_file_is_named(single: Path, damage: Callable[[Path], Any], message: str):
    damage(single)
    assert refusal(single).message.startswith(message.format(single))


def test_pickled_weights_are_refused_with_the_reason(single: Path):
    only_pickle(single)
    assert "loading them runs their code" in str(refusal(single).hint)


def test_an_index_that_names_a_missing_shard(sharded: Path):
    (sharded / SECOND).unlink()
    assert refusal(sharded).message == f"{INDEX_NAME} names {SECOND}, which is missing from {sharded}"


def test_a_lost_index(sharded: Path):
    (sharded / INDEX_NAME).unlink()
    assert refusal(sharded).message == f"{sharded} has safetensors shards but no {INDEX_NAME}"


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_weight_map(sharded: Path, content: str):
    (sharded / INDEX_NAME).write_text(content, "utf-8")
    assert refusal(sharded).message == f"{sharded / INDEX_NAME} has no weight_map"


def test_an_index_that_is_not_json(sharded: Path):
    (sharded / INDEX_NAME).write_text("{", "utf-8")
    assert refusal(sharded).message.startswith(f"{sharded / INDEX_NAME} is not JSON: ")


@pytest.mark.parametrize(
    "shard", ["../single/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "weights.bin", "a\0b"]
)
def test_an_index_cannot_reach_out_of_its_directory(sharded: Path, single: Path, shard: str):
    assert (sharded / "../single/model.safetensors").is_file()
    assert single.is_dir()
    change_index(sharded, a=shard)
    assert "which is no safetensors file beside it" in refusal(sharded).message


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": SECOND}, f"{INDEX_NAME} says that {SECOND} holds a, and it does not"),
        ({"d": FIRST}, f"{INDEX_NAME} says that {FIRST} holds d, and it does not"),
        ({"a": None}, f"{FIRST} holds a, which {INDEX_NAME} does not name"),
    ],
)
def test_an_index_at_odds_with_its_shards(sharded: Path, weight_map: dict[str, str | None], message: str):
    change_index(sharded, **weight_map)
    assert refusal(sharded).message == message


def test_a_tensor_in_two_shards(sharded: Path):
    write_shard(sharded / SECOND, "bc")
    assert refusal(sharded).message == f"tensor b is in {FIRST} and again in {SECOND}"


def test_one_file_and_an_index_of_others(sharded: Path):
    write_shard(sharded / SINGLE_NAME, "abc")
    assert "has both model.safetensors and an index of other shards" in refusal(sharded).message


def test_a_tokenizer_is_asked_for_where_it_is_needed(single: Path):
    checkpoint = Checkpoint.open(single)
    checkpoint.require_tokenizer()
    (single / "tokenizer.json").rename(single / "tokenizer.model")
    checkpoint.require_tokenizer()
    (single / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer \(tokenizer\.json or tokenizer\.model\)") as caught:
        checkpoint.require_tokenizer()
    assert caught.value.hint


def test_companions_are_all_but_weights_index_record_and_hidden_files(sharded: Path):
    for name in (
        "tokenizer.json",
        "LICENSE",
        "gemma-pack.json",
        ".gitattributes",
        "stray.safetensors",
        "a.bin",
        "a.pt",
    ):
        (sharded / name).write_text("{}", "utf-8")
    (sharded / "sub").mkdir()
    assert [path.name for path in Checkpoint.open(sharded).companions()] == ["LICENSE", "config.json", "tokenizer.json"]


def test_json_is_read_as_utf8(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": "ä"}', "utf-8")
    assert read_json(tmp_path / "a.json") == {"a": "ä"}


def test_the_digest_of_a_file_is_told_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gemma_pack.checkpoint.READ_BYTES", 4)
    (tmp_path / "file").write_bytes(b"1234567890")
    pieces: list[int] = []
    assert file_sha256(tmp_path / "file", pieces.append) == hashlib.sha256(b"1234567890").hexdigest()
    assert pieces == [4, 4, 2]
