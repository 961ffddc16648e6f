"""`gemma-pack recipes`: what is listed, shown and checked, for people and for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from gemma_pack.commands import run
from gemma_pack.recipe import load_recipe, parse_recipe, shipped_names, shipped_text

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "list"]])
def test_the_list_is_a_line_a_recipe(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = [line.split(maxsplit=1) for line in captured.out.splitlines()]
    assert lines == [[name, load_recipe(name).summary] for name in shipped_names()]


def test_the_list_for_programs_holds_whole_recipes(capsys: pytest.CaptureFixture[str]):
    assert run(["recipes", "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [recipe["name"] for recipe in listed] == shipped_names()
    assert all(recipe["gate"] for recipe in listed)


def test_show_is_the_file_with_its_comments(capsys: pytest.CaptureFixture[str]):
    assert run(["recipes", "show", "w4a16"]) == 0
    assert capsys.readouterr().out == shipped_text("w4a16")


def test_show_for_programs_has_every_default_filled_in(capsys: pytest.CaptureFixture[str]):
    assert run(["recipes", "show", "w4a16", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == load_recipe("w4a16").model_dump(mode="json")


def test_what_show_prints_is_a_recipe_to_start_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    run(["recipes", "show", "w4a16"])
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out.replace("name: w4a16", "name: mine"), "utf-8")
    assert run(["recipes", "check", "mine.yaml"]) == 0
    first, name, digest, calibration = capsys.readouterr().out.splitlines()
    assert first == "mine.yaml is valid"
    assert name.split() == ["name", "mine"]
    assert digest.split() == ["digest", load_recipe("mine.yaml").digest()]
    assert calibration.split() == ["calibration", "HuggingFaceH4/ultrachat_200k"]


def test_check_for_programs_prints_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mine.yaml"
    file.write_text(shipped_text("w4a16"), "utf-8")
    assert run(["recipes", "check", str(file), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == parse_recipe(file.read_text("utf-8"), origin="").model_dump(
        mode="json"
    )


def test_check_names_the_line_of_every_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    broken = "scheme: W5A16\nalgorithm: gptq\nsumary: x\n"
    (tmp_path / "mine.yaml").write_text(broken, "utf-8")
    assert run(["recipes", "check", "mine.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *mistakes, hint = captured.err.splitlines()
    assert [line.removeprefix("error: ").split(": ")[:2] for line in mistakes] == [
        ["mine.yaml:1", "gate"],
        ["mine.yaml:1", "name"],
        ["mine.yaml:1", "scheme"],
        ["mine.yaml:1", "summary"],
        ["mine.yaml:3", "sumary"],
    ]
    assert hint == "hint: gemma-pack recipes show w4a16 is an example"


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["show", "w4a61"], "there is no recipe named w4a61", "did you mean w4a16?"),
        (
            ["check", "no.yaml"],
            "cannot read no.yaml: No such file or directory",
            "gemma-pack recipes lists the shipped",
        ),
    ],
)
def test_a_recipe_that_is_not_there(arguments: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]):
    assert run(["recipes", *arguments]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == f"error: {error}"
    assert shown[1].startswith(f"hint: {hint}")
