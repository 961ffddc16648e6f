"""The main job, end to end, as a newcomer runs it: the demo model to a registry and back."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
import yaml

from gemma_pack.checkpoint import Checkpoint, file_sha256
from gemma_pack.record import require_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.real.conftest import Built

pytestmark = pytest.mark.real


def test_the_variant_passes_its_gate_and_is_smaller(demo_build: Built) -> None:
    report = demo_build.variant["report"]
    assert report["verdict"] == "pass"
    assert 0.02 < report["divergence"]["kl_nats"]["value"] < 0.2
    assert 1.0 < report["likelihood"]["ppl_variant"] / report["likelihood"]["ppl_base"] < 1.2
    assert demo_build.variant["size_bytes"] < 0.73 * demo_build.variant["base_size_bytes"]


def test_only_what_the_recipe_names_has_changed(demo_build: Built, demo_checkpoint: Path) -> None:
    base, variant = Checkpoint.open(demo_checkpoint), Checkpoint.open(demo_build.directory)
    kept = [name for name in base.tensors if name in variant.tensors]
    assert len(kept) == 236 - 18 * 7
    assert sum("norm" in name for name in kept) == 109
    assert all(base.tensors[name].read() == variant.tensors[name].read() for name in kept)
    assert "lm_head.weight" not in variant.tensors
    proof = require_record(demo_build.directory).quantization.untouched
    assert proof.untouched == len(kept)
    assert len(proof.changed) == 18 * 7


def test_the_same_build_again_does_nothing_and_ends_with_the_same_digest(demo_build: Built) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo_build.directory.iterdir()}
    again = demo_build.run_again()
    assert again.stdout == demo_build.stdout
    assert "quantize layers" not in again.stderr
    assert "Scoring" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in demo_build.directory.iterdir()} == before


def test_the_card_names_the_base_for_what_it_is(demo_build: Built) -> None:
    card = (demo_build.directory / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "gemma"
    assert front["base_model"] == "google/gemma-3-270m"
    assert "GGUF" in card
    kl = demo_build.variant["report"]["divergence"]["kl_nats"]["value"]
    assert f"{kl:.4f}" in card


def test_skopeo_reads_what_was_pushed(demo_build: Built, tool: Callable[[str], str]) -> None:
    pinned = demo_build.variant["pinned"]
    found = subprocess.run(
        [tool("skopeo"), "inspect", "--tls-verify=false", f"docker://{pinned}"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(found.stdout)["Digest"] == demo_build.variant["digest"]


def test_the_pulled_directory_is_the_variant(demo_build: Built, pulled_variant: Path) -> None:
    names = {path.name for path in demo_build.directory.iterdir()}
    assert {path.name for path in pulled_variant.iterdir()} == names
    for name in names:
        assert file_sha256(pulled_variant / name) == file_sha256(demo_build.directory / name)


def test_kserve_manifests_name_the_digest(demo_build: Built) -> None:
    shown = demo_build.gemma_pack("deploy", demo_build.variant["pinned"], "--target", "kserve")
    services = [one for one in yaml.safe_load_all(shown.stdout) if one and one["kind"] == "InferenceService"]
    uri = services[0]["spec"]["predictor"]["model"]["storageUri"]
    assert uri == f"oci://{demo_build.variant['pinned']}"


def test_transformers_loads_the_variant_and_answers(pulled_variant: Path) -> None:
    from transformers import pipeline

    generate = pipeline("text-generation", model=str(pulled_variant), dtype="auto")
    answer = generate("The opposite of hot is", max_new_tokens=2, do_sample=False)[0]["generated_text"]
    assert answer.startswith("The opposite of hot is cold")  # which the base and int4 of it are sure of
