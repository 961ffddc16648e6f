from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gemma_pack.build_file import ValidationPart
from gemma_pack.checkpoint import file_sha256
from gemma_pack.commands import run
from gemma_pack.matrix import _answers
from gemma_pack.oci.layout import Layout
from gemma_pack.wikitext2 import ORIGIN
from tests.reports.reports import make_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.oci.registry import Registry

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = """\
name: {name}
summary: for tests
scheme: {scheme}
algorithm: nearest
gate: [{{kl_nats: {margin}}}]
"""
MARGIN_OF_ANYTHING = 100


@pytest.fixture
def write_build(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that writes build.yaml with a data-free recipe for each margin of KL, and goes there."""
    monkeypatch.chdir(tmp_path)

    def write(*margins: float, **parts: object) -> Path:
        names = []
        for number, margin in enumerate(margins):
            path = tmp_path / f"r{number}.yaml"
            path.write_text(RECIPE.format(name=f"r{number}", scheme="W8A16", margin=margin))
            names.append(str(path))
        plan = {
            "model": str(trained),
            "recipes": names,
            "output": "out",
            "validation": {"profile": "quick"},
            **parts,
        }
        path = tmp_path / "build.yaml"
        path.write_text(yaml.safe_dump(plan))
        return path

    return write


def digests(directory: Path) -> dict[str, str]:
    return {str(path): file_sha256(path) for path in sorted(directory.rglob("*")) if path.is_file()}


def test_a_build_makes_a_variant_its_report_and_its_image(
    write_build: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(write_build(MARGIN_OF_ANYTHING))]) == 0
    shown = capsys.readouterr()
    stem = "trained-quantized.r0"
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["index.html", stem, f"{stem}.oci", f"{stem}.report"]
    assert "PASS" in shown.out
    assert f"out/{stem}.oci@sha256:" in shown.out
    assert f"gemma-pack push out/{stem}.oci" in shown.err
    assert all(len(line) <= 80 for line in shown.out.splitlines()[:8])


def test_the_same_build_again_does_nothing(
    write_build: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["build", str(write_build(MARGIN_OF_ANYTHING)), "--format", "json"]
    assert run(build) == 0
    first, before = capsys.readouterr().out, digests(tmp_path / "out")
    assert run(build) == 0
    assert capsys.readouterr().out == first
    assert digests(tmp_path / "out") == before


def test_another_profile_validates_again_and_packs_the_new_verdict(
    write_build: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(write_build(MARGIN_OF_ANYTHING)), "--format", "json"]) == 0
    [first] = json.loads(capsys.readouterr().out)["variants"]
    path = write_build(MARGIN_OF_ANYTHING, validation={"profile": "quick", "seed": 5})
    assert run(["build", str(path), "--format", "json"]) == 0
    [second] = json.loads(capsys.readouterr().out)["variants"]
    assert second["report"]["protocol"]["text"]["seed"] == 5
    assert second["digest"] != first["digest"]


def test_another_gate_or_another_text_of_the_same_name_validates_again(
    write_build: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gemma_pack.text_sources import builtin_halves

    prose = "\n\n".join(builtin_halves()[1])
    (tmp_path / "mine.txt").write_text(prose, "utf-8")
    part = {"profile": "quick", "text": "mine.txt"}
    build = ["build", str(write_build(MARGIN_OF_ANYTHING, validation=part)), "--format", "json"]
    assert run(build) == 0
    [first] = json.loads(capsys.readouterr().out)["variants"]
    write_build(0, validation=part)
    assert run(build) == 10
    [second] = json.loads(capsys.readouterr().out)["variants"]
    assert second["report"]["gate"]["margins"] == {"kl_nats": 0}
    assert second["report"]["windows"] == first["report"]["windows"]
    (tmp_path / "mine.txt").write_text(prose[len(prose) // 3 :], "utf-8")
    assert run(build) == 10
    [third] = json.loads(capsys.readouterr().out)["variants"]
    assert third["report"]["protocol"]["text"]["sha256"] != first["report"]["protocol"]["text"]["sha256"]


def test_many_models_and_recipes_make_a_row_each(
    write_build: Callable[..., Path], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "other")
    models = {"model": None, "models": [str(trained), {"model": "other"}]}
    path = write_build(MARGIN_OF_ANYTHING, validation={"profile": "smoke"}, **models)
    assert run(["build", str(path)]) == 11
    shown = capsys.readouterr()
    table = shown.out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[2:]] == ["trained", "r0", "other", "r0"]
    assert [line.split()[-1] for line in table if line.startswith("  ")] == ["UNDECIDED"] * 2
    assert all(len(line) <= 80 for line in table)
    assert shown.err.count("error: ") == 1
    page = (tmp_path / "out/index.html").read_text("utf-8")
    links = set(re.findall(r'href="([^"]+)"', page))
    assert links == {f"{stem}-quantized.r0.report/report.html" for stem in ("trained", "other")}
    assert all((tmp_path / "out" / link).is_file() for link in links)


def test_a_stage_that_fails_is_a_row_and_decides_the_exit_code(
    write_build: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe that does not fit, and a place that is taken, beside one that fails its gate: a crash is no verdict."""
    path = write_build(0, MARGIN_OF_ANYTHING, MARGIN_OF_ANYTHING)
    taken = tmp_path / "out/trained-quantized.r1"
    taken.mkdir(parents=True)
    (taken / "mine.txt").touch()
    unfit = tmp_path / "r2.yaml"
    unfit.write_text(unfit.read_text() + "ignore: [model.layers.77.mlp.down_proj]\n")
    assert run(["build", str(path), "--format", "json"]) == 2
    shown = capsys.readouterr()
    variants = json.loads(shown.out)["variants"]
    assert [one["failure"] and one["failure"]["stage"] for one in variants] == [None, "quantize", "quantize"]
    assert variants[0]["report"]["verdict"] == "fail"
    assert "is in the way" in variants[1]["failure"]["message"]
    assert "matches no linear layer" in variants[2]["failure"]["message"]
    assert list(taken.iterdir()) == [taken / "mine.txt"]
    page = (tmp_path / "out/index.html").read_text("utf-8")
    assert "0 of 3 variants passed" in page
    assert "matches no linear layer" in page
    assert run(["build", str(path)]) == 2
    said = capsys.readouterr()
    assert "r1 of" in said.out
    assert "3 of 3 variants are not as they should be" in said.err


def test_recipes_that_calibrate_alike_share_the_pass_and_a_failing_one_costs_the_others_nothing(
    write_build: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gemma_pack.quantization import calibrated

    passes: list[int] = []

    def counted(checkpoint: Any, drafts: Any, *arguments: Any, **words: Any) -> None:
        passes.append(len(drafts))
        whole(checkpoint, drafts, *arguments, **words)

    whole = calibrated.quantize_layers
    monkeypatch.setattr(calibrated, "quantize_layers", counted)
    calibration = {"text": "builtin", "samples": 4, "sequence_length": 32}
    path = write_build(*[MARGIN_OF_ANYTHING] * 3, calibration=calibration, validation={"profile": "smoke"})
    for number, scheme in enumerate(("W8A8", "W4A16", "W4A16")):
        recipe = RECIPE.format(name=f"r{number}", scheme=scheme, margin=MARGIN_OF_ANYTHING)
        gptq = recipe.replace("nearest", "gptq") + "calibration: {dataset: builtin, samples: 4, sequence_length: 32}\n"
        misfit = "ignore: [model.layers.77.mlp.down_proj]\n" if number == 2 else ""
        (tmp_path / f"r{number}.yaml").write_text(gptq + misfit)
    assert run(["build", str(path), "--format", "json"]) == 2
    assert passes == [2]
    shared = json.loads(capsys.readouterr().out)["variants"]
    assert [bool(one["failure"]) for one in shared] == [False, False, True]


@pytest.mark.parametrize(
    ("asked", "spec", "confidence", "answered"),
    [
        ({}, "builtin", 0.95, True),
        ({"extend": True}, "builtin", 0.95, False),
        ({"extend": True}, "builtin", 0.975, True),
        ({"seed": 1}, "builtin", 0.95, False),
        ({"profile": "full"}, "builtin", 0.95, False),
        ({"text": "texts/mine.txt"}, "mine.txt", 0.95, True),
        ({"text": "a/b:c"}, "a/b:c@0123", 0.95, True),
        ({"text": "a/b"}, "a/b:c@0123", 0.95, False),
        ({"text": "wikitext2"}, ORIGIN, 0.95, True),
    ],
)
def test_a_report_is_kept_where_it_answers_what_is_asked(
    asked: dict[str, Any], spec: str, confidence: float, answered: bool
) -> None:
    report = make_report()
    text = report.protocol.text.model_copy(update={"spec": spec, "seed": 0})
    found = report.model_copy(
        update={
            "protocol": report.protocol.model_copy(update={"text": text}),
            "method": report.method.model_copy(update={"confidence": confidence}),
        }
    )
    assert _answers(found, ValidationPart.model_validate({"profile": "quick", **asked})) is answered


def test_models_and_recipes_may_stand_on_the_command_line(
    write_build: Callable[..., Path], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_build(MARGIN_OF_ANYTHING)
    said = ["--recipe", "r0.yaml", "--output", "made", "--profile", "smoke", "--layout", "both", "--format", "json"]
    assert run(["build", str(trained), *said]) in {0, 11}
    shown = json.loads(capsys.readouterr().out)
    [variant] = shown["variants"]
    assert variant["report"]["protocol"]["profile"] == "smoke"
    assert [image["kind"] for image in variant["images"]] == ["modelcar", "artifact"]
    assert all((tmp_path / image["layout"] / "oci-layout").is_file() for image in variant["images"])
    assert shown["index"] == "made/index.html"


def test_options_replace_what_the_file_says_and_leave_the_rest(
    write_build: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_build(MARGIN_OF_ANYTHING, validation={"profile": "quick", "seed": 5})
    assert run(["build", str(path), "--profile", "smoke", "--format", "json"]) in {0, 11}
    [variant] = json.loads(capsys.readouterr().out)["variants"]
    protocol = variant["report"]["protocol"]
    assert (protocol["profile"], protocol["text"]["seed"]) == ("smoke", 5)


def test_a_registry_that_cannot_be_reached_is_said_before_anything_is_made(
    write_build: Callable[..., Path], tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_build(MARGIN_OF_ANYTHING, push=f"127.0.0.1:{free_port}/models/tiny")
    assert run(["build", str(path)]) not in {0, 10, 11}
    assert f"127.0.0.1:{free_port}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_has_passed_is_pushed_in_both_layouts_pulled_back_and_compared(
    write_build: Callable[..., Path], registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_build(0, MARGIN_OF_ANYTHING, package={"layout": "both"}, push=f"{registry.host}/models/tiny")
    assert run(["build", str(path), "--format", "json"]) == 10
    shown = capsys.readouterr()
    failed, passed = json.loads(shown.out)["variants"]
    assert [image["pinned"] for image in failed["images"]] == [None, None]
    assert "has not passed and is not pushed" in shown.err
    assert len(list((tmp_path / "out").iterdir())) == 1 + 2 * 4
    assert passed["pinned"] == f"{registry.host}/models/tiny@{passed['digest']}"
    for image, tag in zip(passed["images"], ("r1", "r1-artifact"), strict=True):
        assert image["pinned"] == f"{registry.host}/models/tiny@{image['digest']}"
        assert run(["pull", f"{registry.host}/models/tiny:{tag}", "-o", str(tmp_path / tag)]) == 0
        assert (tmp_path / tag / "config.json").is_file()
        capsys.readouterr()
        assert run(["referrers", image["pinned"], "--format", "json"]) == 0
        attached = json.loads(capsys.readouterr().out)["referrers"]
        assert [(one["kind"], one["verdict"]) for one in attached] == [
            ("sbom", None), ("provenance", None), ("report", "pass"),
        ]  # fmt: skip
    assert run(["deploy", passed["pinned"], "--target", "vllm"]) == 0


@pytest.mark.parametrize(
    ("parts", "code", "message"),
    [
        ({"validation": {"text": "nosuch.txt"}}, 1, "nosuch.txt"),
        ({"validation": {"text": "no such text"}}, 1, "there is no text named no such text"),
        ({"package": {"platforms": ["amd64"]}}, 2, "package.platforms: 'amd64' is not os/architecture"),
        ({"package": {"platforms": ["linux/s390x"]}}, 2, "the base embedded has no linux/s390x"),
        ({"package": {"base": "./nosuch"}}, 2, "./nosuch is no OCI layout"),
        ({"package": {"base": "registry.invalid/A:1"}}, 2, "registry.invalid/A:1"),
    ],
)
def test_what_a_later_stage_cannot_do_is_said_before_anything_is_made(
    write_build: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    parts: dict[str, Any],
    code: int,
    message: str,
) -> None:
    assert run(["build", str(write_build(MARGIN_OF_ANYTHING, **parts))]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["modelcar", "both"])
def test_an_image_of_another_date_or_base_makes_room_for_the_one_that_is_asked_for(
    write_build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    digests: list[str] = []
    for date, base in (("1000000000", "embedded"), ("1100000000", "embedded"), ("1100000000", "none")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", date)
        path = write_build(MARGIN_OF_ANYTHING, package={"layout": layout, "base": base})
        assert run(["build", str(path), "--format", "json"]) == 0
        [variant] = json.loads(capsys.readouterr().out)["variants"]
        for image in variant["images"]:
            assert Layout.open(Path(image["layout"])).root.digest == image["digest"]
        digests.append(variant["digest"])
    assert len(set(digests)) == 3


def test_hidden_files_that_no_image_takes_are_not_missed_in_what_comes_back(
    write_build: Callable[..., Path], registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_build(MARGIN_OF_ANYTHING))
    assert run(["build", path]) == 0
    variant = tmp_path / "out/trained-quantized.r0"
    (variant / ".d").mkdir()
    (variant / ".d/y").write_text("y")
    (variant / ".x").write_text("x")
    capsys.readouterr()
    assert run(["build", path, "--push", f"{registry.host}/models/tiny", "--format", "json"]) == 0
    [one] = json.loads(capsys.readouterr().out)["variants"]
    assert one["pinned"] == f"{registry.host}/models/tiny@{one['digest']}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: demo\nrecipes: []\n", "build.yaml:2: recipes"),
        ("model: demo\nrecipes: [w4a16]\nprofile: quick\n", "build.yaml:3: profile: unknown key"),
        ("model: demo\nrecipes: [w4a16]\nvalidation: {profile: thorough}\n", "build.yaml:3: validation.profile"),
        ("model: [demo\n", "build.yaml:2: not YAML"),
        ("model: demo\nrecipes: [w4a17]\n", "no recipe named w4a17"),
        ("recipes: [w4a16]\n", "build.yaml:1: models: model is missing"),
        ("recipes: [w4a16]\nmodel: demo\nmodels: [demo]\n", "build.yaml:3: models: there is a model already"),
        ("recipes: [w4a16]\nmodels:\n  - demo\n  - {name: a/b}\n", "build.yaml:4: models.1.name: unknown key"),
        ("models: [a/b]\nrevision: main\nrecipes: [w4a16]\n", "build.yaml:2: revision: several models have"),
        ("models: [a/b, c/b]\nrecipes: [w4a16]\n", "w4a16 of a/b and w4a16 of c/b would both make"),
        ("model: demo\nrecipes: [w4a16]\npackage: {layout: all}\n", "build.yaml:3: package.layout"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build.yaml").write_text(text)
    assert run(["build", "build.yaml"]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "no recipe is said for demo"),
        (["demo", "a.yaml", "-r", "w4a16"], "a.yaml is a build file"),
        (["demo", "a/b", "-r", "w4a16", "--revision", "main"], "--revision is of one model"),
        (["demo", "-r", "w4a16", "--engine", "ray"], "RAY_ADDRESS names no cluster"),
        (["nosuchmodel", "-r", "w4a16"], "neither demo, nor an existing directory, nor a hub id"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run(["build", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_example_is_a_build_file_whose_recipes_are_shipped() -> None:
    from gemma_pack.build_file import load_build_file
    from gemma_pack.matrix import wanted_variants

    examples = sorted(EXAMPLES.glob("*.yaml"))
    wanted = {path.name: wanted_variants(load_build_file(path)) for path in examples}
    assert [len(wanted[name]) for name in ("demo.yaml", "matrix.yaml")] == [1, 6]
    assert {one.repository for one in wanted["matrix.yaml"]} == {
        "registry.example.com/models/gemma-2-9b-it", "registry.example.com/models/gemma-3-4b-it",
    }  # fmt: skip


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err
