"""The model card: front matter that the hub reads, and every number from the record."""

from __future__ import annotations

import ast
import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gemma_pack.commands import run
from gemma_pack.errors import CheckpointError
from gemma_pack.record import Metric, Record
from gemma_pack.reports.benchmarks import benchmark_header, benchmark_rows
from gemma_pack.reports.card import INFERENCE_SERVER_IMAGE, VLLM_IMAGE, render_card, write_card
from tests.deploy import crd
from tests.published import published
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


def test_the_hubs_own_reader_reads_it(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    record = quantized_record().model_copy(update={"validation": validation_record()})
    text = render_card(write_variant(tmp_path, record))
    card = ModelCard(text)
    assert card.data.base_model == "google/gemma-2-9b-it"
    assert card.data.license == "gemma"
    assert card.data.to_dict() == front_matter(text)
    assert card.text.strip().startswith("# gemma-2-9b-it-quantized.w4a16")


def test_front_matter_is_what_the_catalog_reads(tmp_path: Path) -> None:
    record = quantized_record()
    matter = front_matter(render_card(write_variant(tmp_path, record)))
    assert matter["name"] == "gemma-2-9b-it-quantized.w4a16"
    assert matter["description"] == "google/gemma-2-9b-it, quantized to int4 weights in groups of 128"
    assert (matter["readme"], matter["provider"], matter["tasks"]) == ("README.md", "Google", ["text-to-text"])
    assert "validated_on" not in matter
    judged = record.model_copy(update={"validation": validation_record()})
    assert front_matter(render_card(write_variant(tmp_path, judged)))["validated_on"] == ["transformers 5.17.0"]
    seeing = front_matter(render_card(write_variant(tmp_path, record, model_type="gemma3")))
    assert (seeing["pipeline_tag"], seeing["tasks"]) == ("image-text-to-text", ["image-text-to-text"])


def test_the_benchmarks_show_both_sides_what_is_between_and_how_sure_that_is() -> None:
    metrics = (
        Metric(name="ppl_base", value=11.25),
        Metric(name="ppl_variant", value=11.42),
        Metric(
            name="ppl_increase_percent",
            value=1.5,
            bound=1.875,
            opposite_bound=1.125,
            margin=3,
            verdict="pass",
            unit="%",
        ),
        Metric(name="kl_nats", value=0.03, bound=0.04, margin=0.05, verdict="pass", unit="nats"),
        Metric(name="arc_base", value=70, unit="%"),
        Metric(name="arc_variant", value=69, unit="%"),
        Metric(name="arc_recovery_percent", value=98.57, bound=97, opposite_bound=100.5, unit="%"),
        Metric(name="empty_answers", value=0, margin=0, verdict="pass"),
    )
    assert benchmark_header(0.95)[4] == "90 % interval"
    assert benchmark_header(0.975)[4] == "95 % interval", "of a second look"
    assert benchmark_rows(metrics) == [
        ["perplexity", "11.250", "11.420", "1.50 %", "1.12 to 1.88 %", "≤ 3.00 %", "PASS"],
        ["mean KL(base‖variant)", "", "", "0.0300 nats", "≤ 0.0400 nats", "≤ 0.0500 nats", "PASS"],
        ["arc", "70.0000 %", "69.0000 %", "98.5700 %", "97.0000 to 100.5000 %", "", ""],
        ["empty answers", "", "", "0", "", "≤ 0", "PASS"],
    ]


def test_the_servers_are_those_that_deploy_runs() -> None:
    from gemma_pack.deploy import kserve, rhaiis

    assert rhaiis.SERVER_IMAGE == INFERENCE_SERVER_IMAGE
    assert VLLM_IMAGE.rpartition(":")[2] == kserve.RUNTIME_VERSION
    assert kserve.RUNTIME_IMAGE.partition("@")[0] == VLLM_IMAGE.rpartition(":")[0]


@pytest.mark.parametrize("chat", [True, False])
def test_the_programs_on_the_card_are_programs_and_use_what_there_is(tmp_path: Path, chat: bool) -> None:
    """What older Gemma cards show and transformers 5 no longer has must not come back."""
    card = render_card(write_variant(tmp_path, quantized_record(), chat=chat))
    programs = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    assert len(programs) == 4
    for program in programs:
        tree = ast.parse(program)
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not imported & {"HybridCache", "SlidingWindowCache"}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            keywords = {keyword.arg for keyword in call.keywords}
            assert "torch_dtype" not in keywords
            if ast.unparse(call.func) != "BitsAndBytesConfig":
                assert not keywords & {"load_in_8bit", "load_in_4bit"}
    for name in ("float32", "bfloat16", "int8", "nf4"):
        assert f'"{name}"' in programs[-1]
    scripts = re.findall(r"^```sh\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    assert all(shlex.split(script, comments=True) for script in scripts)


def test_the_manifests_on_the_card_are_what_kserve_takes(tmp_path: Path) -> None:
    card = render_card(write_variant(tmp_path, quantized_record()))
    [manifests] = re.findall(r"^```yaml\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    runtime, service = yaml.safe_load_all(manifests)
    kinds = {"ServingRuntime": "kserve-servingruntimes.yaml", "InferenceService": "kserve-inferenceservices.yaml"}
    paths = {kind: published(name) for kind, name in kinds.items()}
    for manifest in (runtime, service):
        version = manifest["apiVersion"].partition("/")[2]
        validator = crd.validator(paths[manifest["kind"]], version)
        assert [error.message for error in validator.iter_errors(manifest)] == []
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]


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
