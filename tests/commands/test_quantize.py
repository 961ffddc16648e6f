"""`gemma-pack quantize` and bad input: one sentence, its cause, a way out, the exit code, and nothing left behind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from gemma_pack.commands import run
from gemma_pack.recipe import shipped_text
from gemma_pack.safetensors_file import write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TARGET = "tiny-quantized.w4a16"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty directory, with no network and no model but those that a test makes."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("GEMMA_PACK_MODEL", raising=False)
    return directory


@pytest.fixture
def tiny(work: Path) -> Path:
    """Return a sound checkpoint, as far as its files tell, named `tiny`."""
    directory = work / "tiny"
    directory.mkdir()
    config = {"model_type": "gemma3_text", "dtype": "bfloat16", "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    (directory / "tokenizer.json").write_text("{}", "utf-8")
    write_weights(directory, "BF16")
    return directory


def write_weights(directory: Path, dtype: str) -> None:
    write_safetensors(directory / "model.safetensors", [("model.embed_tokens.weight", dtype, (2, 2), lambda: bytes(8))])


def change_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run `gemma-pack quantize`; return its exit code, sentence and hint."""
    code = run(["quantize", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    error = next(line for line in lines if line.startswith("error: "))
    return code, error.removeprefix("error: "), lines[-1].removeprefix("hint: ")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_an_unknown_recipe(capsys: pytest.CaptureFixture[str]):
    found = failure(capsys, "demo", "--recipe", "w4a61")
    assert found == (2, "there is no recipe named w4a61", "did you mean w4a16?")


def test_a_broken_recipe(work: Path, capsys: pytest.CaptureFixture[str]):
    (work / "mine.yaml").write_text("name: [\n", "utf-8")
    code, error, _ = failure(capsys, "demo", "--recipe", "mine.yaml")
    assert (code, error.startswith("mine.yaml:2: not YAML: ")) == (2, True)


def test_every_recipe_is_read_before_the_first_is_run(tiny: Path, capsys: pytest.CaptureFixture[str]):
    code, error, _ = failure(capsys, str(tiny), "-r", "w4a16", "-r", "xyzzy")
    assert (code, error) == (2, "there is no recipe named xyzzy")


def test_one_output_for_several_recipes(work: Path, tiny: Path, capsys: pytest.CaptureFixture[str]):
    (work / "mine.yaml").write_text(shipped_text("w4a16").replace("name: w4a16", "name: mine"), "utf-8")
    found = failure(capsys, str(tiny), "-r", "w4a16", "-r", "mine.yaml", "-o", "out")
    assert found == (2, "-o names one directory, and there are several recipes", "leave out -o")


def test_two_recipes_of_one_name(work: Path, tiny: Path, capsys: pytest.CaptureFixture[str]):
    (work / "mine.yaml").write_text(shipped_text("w4a16"), "utf-8")
    code, error, _ = failure(capsys, str(tiny), "-r", "w4a16", "-r", "mine.yaml")
    assert (code, error) == (2, f"the recipes w4a16 and mine.yaml would both make {TARGET}")


@pytest.mark.parametrize("output", [TARGET, "elsewhere"])
def test_an_output_in_the_way_is_refused_before_anything_is_fetched(
    output: str, work: Path, capsys: pytest.CaptureFixture[str]
):
    (work / output).mkdir()
    (work / output / "thesis.txt").write_text("mine", "utf-8")
    arguments = ["google/tiny", "-r", "w4a16", *([] if output == TARGET else ["-o", output])]
    found = failure(capsys, *arguments)
    assert found == (2, f"{output} is in the way", "choose another directory with -o, or remove it first")
    assert (work / output / "thesis.txt").read_text("utf-8") == "mine"


def test_a_broken_record_in_the_way(work: Path, capsys: pytest.CaptureFixture[str]):
    (work / TARGET).mkdir()
    (work / TARGET / "gemma-pack.json").write_text("{", "utf-8")
    code, error, _ = failure(capsys, "google/tiny", "-r", "w4a16")
    assert (code, "is no valid record" in error) == (1, True)


def float16_config(directory: Path) -> None:
    change_config(directory, dtype="float16")


def float16_tensors(directory: Path) -> None:
    write_weights(directory, "F16")


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def missing_shard(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (float16_config, "the checkpoint is float16, and Gemma's activations overflow it"),
        (float16_tensors, "the checkpoint is float16, and Gemma's activations overflow it"),
        (lambda directory: change_config(directory, model_type="llama"), "this is not a Gemma: "),
        (lambda directory: change_config(directory, model_type="gemma3n"), "Gemma 3n is not supported yet"),
        (
            lambda directory: change_config(directory, model_type="gemma4_text", num_hidden_layers=35),
            "this Gemma 4 has embeddings for each layer, as E2B and E4B have, and that is not supported yet",
        ),
        (lambda directory: change_config(directory, quantization_config={}), "the checkpoint is quantized already"),
        (truncated, "{}/model.safetensors is truncated: "),
        (
            lambda directory: (directory / "model.safetensors").write_bytes(b"PK"),
            "{}/model.safetensors is truncated or",
        ),
        (
            missing_shard,
            "model.safetensors.index.json names model-00001-of-00001.safetensors, which is missing from {}",
        ),
        (lambda directory: (directory / "tokenizer.json").unlink(), "{} has no tokenizer "),
        (lambda directory: (directory / "config.json").unlink(), "{} has no config.json"),
        (lambda directory: (directory / "config.json").write_text("{", "utf-8"), "{}/config.json is not JSON: "),
        (lambda directory: (directory / "model.safetensors").unlink(), "{} has no model.safetensors"),
    ],
)
def test_a_checkpoint_that_cannot_be_quantized(
    damage: Callable[[Path], object], sentence: str, work: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
):
    damage(tiny)
    code, error, hint = failure(capsys, str(tiny), "-r", "w4a16", "--calibration", "builtin")
    assert code == 1
    assert error.startswith(sentence.format(tiny))
    assert hint, "there is a way out"
    assert names(work) == ["tiny"], "nothing is left behind"


def test_a_directory_that_is_none(capsys: pytest.CaptureFixture[str]):
    code, error, hint = failure(capsys, "./nowhere", "-r", "w4a16")
    assert (code, hint) == (2, "a hub id looks like google/gemma-2-9b-it")
    assert error == "./nowhere is neither demo, nor an existing directory, nor a hub id"


def test_the_model_is_the_argument_then_the_variable_then_the_project_file_then_gemma_2_9b_it(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def model(*arguments: str) -> str:
        code, error, _ = failure(capsys, *arguments, "-r", "w4a16")
        assert code == 14, "the hub is not in reach"
        return error.split()[0]

    assert model() == "google/gemma-2-9b-it"
    (work / "gemma-pack.yaml").write_text("model: team/from-the-file  # why\nother: 1\n", "utf-8")
    assert model() == "team/from-the-file"
    monkeypatch.setenv("GEMMA_PACK_MODEL", "team/from-the-variable")
    assert model() == "team/from-the-variable"
    assert model("team/from-the-argument") == "team/from-the-argument"


@pytest.mark.parametrize("content", ["other: 1\n", "model:\n"])
def test_a_project_file_without_a_model_leaves_the_default(
    content: str, work: Path, capsys: pytest.CaptureFixture[str]
):
    (work / "gemma-pack.yaml").write_text(content, "utf-8")
    assert failure(capsys, "-r", "w4a16")[1].startswith("google/gemma-2-9b-it ")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"model: [\n", "gemma-pack.yaml:2: not YAML: "),
        (b"model: a\nmodel: b\n", "gemma-pack.yaml:2: model stands twice"),
        (b"model: [google/gemma-2-9b-it]\n", "gemma-pack.yaml:1: model: Input should be a valid string"),
        (b"model: 2026-13-45\n", "gemma-pack.yaml:1: 2026-13-45 is a date in YAML; put it in quotes"),
        (b"\xff", "cannot read gemma-pack.yaml: it is not UTF-8"),
    ],
)
def test_a_broken_project_file(content: bytes, error: str, work: Path, capsys: pytest.CaptureFixture[str]):
    (work / "gemma-pack.yaml").write_bytes(content)
    code, found, hint = failure(capsys, "-r", "w4a16")
    assert (code, found[: len(error)]) == (2, error)
    assert hint == "write `model: google/gemma-2-9b-it` into it, or name the model on the command line"


def test_a_project_file_that_cannot_be_read(work: Path, capsys: pytest.CaptureFixture[str]):
    (work / "gemma-pack.yaml").mkdir()
    assert failure(capsys, "-r", "w4a16")[:2] == (2, "cannot read gemma-pack.yaml: Is a directory")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--samples", "0"), ("--sequence-length", "8"), ("--seed", "-1"), ("--device", "tpu"), ("--samples", "1e3")],
)
def test_numbers_that_make_no_sense(option: str, value: str, capsys: pytest.CaptureFixture[str]):
    code, error, hint = failure(capsys, "demo", "-r", "w4a16", option, value)
    assert (code, hint) == (2, "gemma-pack quantize --help says how")
    assert f"'{option}'" in error


def test_a_gpu_that_is_not_there_is_missed_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, error, hint = failure(capsys, "google/tiny", "-r", "w4a16", "--device", "cuda")
    assert (code, hint) == (12, "leave out --device cuda to use the CPU")
    assert "CUDA" in error


def test_a_calibration_file_with_nothing_in_it(work: Path, tiny: Path, capsys: pytest.CaptureFixture[str]):
    from tests.tiny import write_tokenizer

    write_tokenizer(tiny)
    (work / "empty.txt").touch()
    code, error, hint = failure(capsys, str(tiny), "-r", "w4a16", "--calibration", "empty.txt", "--device", "cpu")
    assert code == 1
    assert "empty.txt" in error
    assert hint
    assert names(work) == ["empty.txt", "tiny"]
