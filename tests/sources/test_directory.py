from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from gemma_pack.checkpoint import SINGLE_NAME, Checkpoint
from gemma_pack.console import Console
from gemma_pack.errors import CheckpointError
from gemma_pack.record import Record
from gemma_pack.safetensors_file import write_safetensors
from gemma_pack.sources.directory import check_directory
from gemma_pack.sources.outline import outline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tiny import Family


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "my-gemma")


def check(directory: Path):
    return check_directory(directory, Console("quiet"))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3"])
def test_each_family_is_taken_as_it_is(tiny_checkpoints: Callable[[Family], Path], family: Family):
    directory = tiny_checkpoints(family)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    source = check(directory)
    assert source.kind == "directory"
    assert source.model_id == f"tiny-{family}"
    assert {file.path for file in source.files} == set(before)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_files_that_no_checkpoint_needs_are_not_part_of_the_source(copy: Path):
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    (copy / "notes.txt").write_text("mine")
    assert not {"pytorch_model.bin", "notes.txt"} & {file.path for file in check(copy).files}


def test_a_record_is_believed_while_its_digests_match(copy: Path):
    source = check(copy).model_copy(update={"kind": "hub", "model_id": "google/gemma-3-1b-it", "revision": "a" * 40})
    Record(source=source).write(copy)
    assert check(copy) == source


def test_a_record_is_not_believed_after_a_byte_changed(copy: Path, capsys: pytest.CaptureFixture[str]):
    source = check(copy).model_copy(update={"kind": "hub", "model_id": "google/gemma-3-1b-it"})
    Record(source=source).write(copy)
    with (copy / SINGLE_NAME).open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    found = check_directory(copy, Console("quiet"))
    assert found.kind == "directory"
    assert {file.path for file in found.files} == {file.path for file in source.files}
    assert "no longer match" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "card", "licence"),
    [
        ("gemma3_text", None, "gemma"),
        ("gemma2", "---\nlicense: mit\n---\n# x\n", "mit"),
        ("gemma3_text", "---\nlicense: other\nlicense_name: mine\n---\n# x\n", "mine"),
        ("gemma3_text", "---\nlicense: [gemma\n---\n# x\n", "gemma"),
        ("gemma4_text", None, "apache-2.0"),
        ("gemma4", "---\ntags: [x]\n---\n# x\n", "apache-2.0"),
        ("gemma4_unified", "---\nlicense: gemma\n---\n# x\n", "gemma"),
    ],
)
def test_the_licence_is_the_cards_else_that_of_the_family(
    tiny_checkpoints: Callable[[Family], Path], tmp_path: Path, family: Family, card: str | None, licence: str
):
    directory = shutil.copytree(tiny_checkpoints(family), tmp_path / "mine")
    if card:
        (directory / "README.md").write_text(card)
    assert check(directory).license == licence


def test_an_adapter_beside_the_weights_is_not_applied(copy: Path, capsys: pytest.CaptureFixture[str]):
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    check_directory(copy, Console("quiet"))
    assert "the adapter beside the weights is not applied: merge it into its base first" in capsys.readouterr().err
    assert "adapter_config.json" not in {path.name for path in Checkpoint.open(copy).companions()}


def test_an_adapter_alone_is_no_model(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 100)
    for look in (check, lambda directory: outline(str(directory))):
        with pytest.raises(CheckpointError, match="is a LoRA adapter, not a model") as caught:
            look(tmp_path)
        assert "merge_and_unload" in (caught.value.hint or "")


def test_a_directory_without_a_tokenizer_is_refused(copy: Path):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        check(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "not a Gemma"),
        ({"dtype": "float16"}, "float16"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ],
)
def test_a_config_that_cannot_be_quantized_is_refused(copy: Path, change: dict[str, object], message: str):
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        check(copy)


@pytest.mark.parametrize(("dtype", "message"), [("F16", "overflow"), ("F32", r"1 of \d+ tensors are not BF16")])
def test_tensors_are_looked_at_and_not_only_the_config(copy: Path, dtype: str, message: str):
    checkpoint = Checkpoint.open(copy)
    odd = "model.norm.weight"
    zeros = bytes(checkpoint.tensors[odd].parameters * (2 if dtype == "F16" else 4))
    write_safetensors(
        copy / "new",
        [
            (name, dtype, info.shape, lambda: zeros) if name == odd else (name, info.dtype, info.shape, info.read)
            for name, info in checkpoint.tensors.items()
        ],
    )
    (copy / "new").replace(copy / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=message):
        check(copy)
