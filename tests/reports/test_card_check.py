"""A card against its record: what gemma-pack writes agrees, and each kind of wrong claim is found at its line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.commands import run
from gemma_pack.reports.card import render_card, write_card
from gemma_pack.reports.card_check import compare_cards
from tests.records import quantized_record, validation_record
from tests.reports.test_card import write_variant

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    record = quantized_record().model_copy(update={"validation": validation_record()})
    return render_card(write_variant(tmp_path_factory.mktemp("variant"), record))


@pytest.fixture(scope="session")
def unjudged(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_card(write_variant(tmp_path_factory.mktemp("variant"), quantized_record()))


def said(text: str, reference: str) -> list[str]:
    return [one.says for one in compare_cards(text, reference)]


def test_a_card_agrees_with_its_own_record(card: str, unjudged: str) -> None:
    assert compare_cards(card, card) == []
    assert compare_cards(unjudged, unjudged) == []


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("license: gemma\n", "license: llama2\n", "license: llama2"),
        ("base_model: google/gemma-2-9b-it", "base_model: google/gemma-2-2b-it", "base_model: google/gemma-2-2b-it"),
        ("base_model: google/gemma-2-9b-it\n", "", "base_model: nothing"),
        ("- transformers 5.17.0", "- RHOAI 2.20", "validated_on: RHOAI 2.20"),
        ("# gemma-2-9b-it-quantized.w4a16", "# gemma-2-9b-it-quantized.w8a8", "w8a8"),
        ("| 18.48 GB |", "| 17.48 GB |", "bytes of tensors, base: 17.48 GB"),
        ("| 18.48 GB | 6.15 GB |", "| 6.15 GB | 18.48 GB |", "bytes of tensors, base: 6.15 GB"),
        ("| 0.0312 nats |", "| 0.0213 nats |", "mean KL(base‖variant), recovery or change: 0.0213 nats"),
        ("≤ 0.0500 nats", "≤ 0.5 nats", "mean KL(base‖variant), margin: ≤ 0.5 nats"),
        ("**PASS**", "**FAIL**", "FAIL"),
        ("512 windows of 512 tokens", "256 windows of 512 tokens", None),
        ("same 32 windows", "same 320 windows", "320 windows"),
        ("b2" * 32, "b3" * 32, "b3" * 32),
        ("c" * 40, "d" * 40, "d" * 40),
        ("| device | cuda |", "| device | cpu |", "device, : cpu"),
    ],
)
def test_a_claim_without_a_record_is_found(card: str, right: str, wrong: str, says: str | None) -> None:
    assert right in card
    changed = card.replace(right, wrong, 1)
    found = compare_cards(changed, card)
    assert found
    assert says is None or says in [one.says for one in found]
    lines = changed.split("\n")
    assert all(wrong.strip("\n") in lines[one.line - 1] for one in found if one.line > 2 and "\n" not in wrong.strip())


def test_a_stale_card_is_found_in_both_directions(card: str, unjudged: str) -> None:
    assert said(unjudged, card) == ["Not validated yet"]
    assert "PASS" in said(card, unjudged)
    assert "validated_on: transformers 5.17.0" in said(card, unjudged)


def test_a_card_of_somebody_else_may_claim_less_and_in_other_words(card: str) -> None:
    text = """\
---
base_model: [google/gemma-2-9b-it]
license: gemma
---
# Our Gemma in int4
It takes 6.2 GB, a third of 18.5 GB, and its perplexity rises by 1.5 %. Call port 8000, or see
[the page](https://example.com/99%25) and:
```sh
vllm serve x --max-model-len 4096  # 77 % faster
```
| Benchmark | ours |
|---|---|
| Same first choice | 93.5 % |
"""
    assert compare_cards(text, card) == []


def test_figures_that_no_record_stands_behind_are_found(card: str) -> None:
    text = """\
---
base_model: google/gemma-2-9b-it
license: gemma
---
It keeps 99.6 % of the base.

| Benchmark | base | ours | Recovery |
|---|---|---|---|
| MMLU (5-shot) | 72.28 | 71.36 | 98.7 % |
"""
    assert said(text, card) == ["99.6 %", "MMLU (5-shot): 72.28", "MMLU (5-shot): 71.36", "MMLU (5-shot): 98.7 %"]


def test_a_failed_variant_may_not_keep_silent(card: str) -> None:
    failed = card.replace("**PASS**", "**FAIL**")
    silent = failed.replace("**FAIL**", "as it came out")
    assert said(silent, failed) == ["no verdict"]
    assert said(card.replace("**PASS**", "fine"), card) == []


@given(st.text())
def test_any_text_is_read_without_a_traceback(text: str) -> None:
    reference = "---\nlicense: gemma\n---\n# x\n"
    assert all(one.line >= 0 for one in compare_cards(text, reference))
    assert all(one.line >= 0 for one in compare_cards(f"---\n{text}\n---\n| {text} |", reference))


def test_the_command_ends_with_1_and_names_each_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_card(write_variant(tmp_path / "variant", quantized_record()))
    assert run(["card", "--check", str(path)]) == 0
    assert "says what the record says" in capsys.readouterr().out
    elsewhere = tmp_path / "published.md"
    elsewhere.write_text(path.read_text("utf-8").replace("6.15 GB", "5.15 GB"), "utf-8")
    assert run(["card", "--check", str(elsewhere), str(path.parent), "--format", "json"]) == 1
    captured = capsys.readouterr()
    [one] = json.loads(captured.out)["disagreements"]
    assert one["says"] == "bytes of tensors, this variant: 5.15 GB"
    assert "6.15 GB" in one["record"]
    assert json.loads(captured.err)["error"]["exit_code"] == 1
    assert run(["card", "--check", str(elsewhere), str(path.parent)]) == 1
    assert f"{elsewhere}:{one['line']}: " in capsys.readouterr().out


def test_what_cannot_be_checked_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_variant(tmp_path / "variant", quantized_record())
    (directory / "README.md").write_bytes(b"\xff\xfe")
    assert run(["card", "--check", str(directory / "README.md")]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert run(["card", "--check", str(tmp_path / "none.md"), str(directory)]) == 2
    assert "none.md" in capsys.readouterr().err
    assert run(["card"]) == 2
    assert "directory is missing" in capsys.readouterr().err
