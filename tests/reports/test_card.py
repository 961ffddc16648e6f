"""The model card: front matter that the hub reads, and every number from the record."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gemma_pack.commands import run
from gemma_pack.errors import CheckpointError
from gemma_pack.record import Record
from gemma_pack.reports.card import render_card, write_card
from tests.records import quantized_record, validation_record

if TYPE_CHECKING:
    from pathlib import Path


def write_variant(directory: Path, record: Record, *, model_type: str = "gemma2", chat: bool = True) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if chat:
        (directory / "chat_template.jinja").write_text("{{ messages }}")
    record.write(directory)
    return directory


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    parsed: dict[str, Any] = yaml.safe_load(matter)
    return parsed


def numbers(value: object) -> list[str]:
    """Return every string of 40 or more characters and every count in a part of the record."""
    if isinstance(value, dict):
        return [found for entry in value.values() for found in numbers(entry)]
    if isinstance(value, str):
        return [value] if len(value) >= 40 else []
    return [str(value)] if isinstance(value, int) and not isinstance(value, bool) and value < 10**6 else []


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    matter = front_matter(render_card(write_variant(tmp_path, quantized_record())))
    assert matter["base_model"] == "google/gemma-2-9b-it"
    assert matter["base_model_relation"] == "quantized"
    assert matter["license"] == matter["license_name"] == "gemma"
    assert matter["license_link"] == "https://ai.google.dev/gemma/terms"
    assert matter["pipeline_tag"] == "text-generation"
    assert matter["library_name"] == "transformers"
    assert matter["language"] == ["en"]
    assert {"gemma2", "w4a16", "int4", "compressed-tensors", "vllm"} <= set(matter["tags"])


def test_every_number_of_the_record_is_on_the_card(tmp_path: Path) -> None:
    record = quantized_record().model_copy(update={"validation": validation_record()})
    card = render_card(write_variant(tmp_path, record))
    assert record.quantization
    assert record.validation
    parts = record.model_dump(mode="json", exclude={"source": {"files"}, "schema_version": True})
    for number in [*numbers(parts["quantization"]), *numbers(parts["validation"])]:
        assert number in card
    for written in (
        "18.48 GB",
        "6.15 GB",
        "33.3 %",
        "1.50 %",
        "≤ 1.88 %",
        "≤ 3.00 %",
        "0.0312 nats",
        "≥ 93.25 %",
        "PASS",
        "0.5000 nats before, 0.2500 nats after",
    ):
        assert written in card


def test_a_card_without_a_validation_says_so(tmp_path: Path) -> None:
    card = render_card(write_variant(tmp_path, quantized_record()))
    assert "Not validated yet" in card
    assert "Verdict" not in card


def test_the_base_is_named_for_what_it_is(tmp_path: Path) -> None:
    record = quantized_record(kind="demo", model_id="google/gemma-3-270m", revision=None, note="a dequantized GGUF")
    card = render_card(write_variant(tmp_path, record, model_type="gemma3_text"))
    assert "> **About the base:** a dequantized GGUF." in card
    assert front_matter(card)["language"] == ["multilingual"]


def test_a_directory_is_no_model_of_the_hub(tmp_path: Path) -> None:
    card = render_card(write_variant(tmp_path, quantized_record(kind="directory", model_id="my-gemma", revision=None)))
    assert "base_model" not in front_matter(card)
    assert "huggingface.co/my-gemma" not in card
    assert "# my-gemma-quantized.w4a16" in card


@pytest.mark.parametrize(("chat", "path"), [(True, "/v1/chat/completions"), (False, "/v1/completions")])
def test_the_request_fits_the_model(tmp_path: Path, chat: bool, path: str) -> None:
    assert path in render_card(write_variant(tmp_path, quantized_record(), chat=chat))


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_card(write_variant(tmp_path, quantized_record())).read_bytes()
    assert write_card(tmp_path).read_bytes() == first


@pytest.mark.parametrize("record", [None, Record(source=quantized_record().source)])
def test_what_is_no_variant_has_no_card(tmp_path: Path, record: Record | None) -> None:
    if record:
        write_variant(tmp_path, record)
    with pytest.raises(CheckpointError) as caught:
        write_card(tmp_path)
    assert caught.value.hint
    assert not (tmp_path / "README.md").exists()


def test_the_command_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_variant(tmp_path, quantized_record())
    assert run(["card", str(tmp_path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"card": str(tmp_path / "README.md")}
    assert run(["card", str(tmp_path / "nowhere")]) == 1
    assert "gemma-pack.json" in capsys.readouterr().err
