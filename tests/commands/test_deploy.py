"""`gemma-pack deploy` on images in a real registry: what it finds, pins, computes, prints and writes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.commands import run
from gemma_pack.commands.deploy import SCHEMES, TARGETS
from gemma_pack.console import Console
from gemma_pack.deploy import MAKERS
from gemma_pack.deploy.options import STORAGE_SCHEMES
from gemma_pack.deploy.resources import GPU_MEMORY_BYTES
from gemma_pack.oci import referrers
from gemma_pack.oci.evidence import attach_report
from gemma_pack.oci.package import package
from gemma_pack.oci.push import push
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.signing import SigningKey
from gemma_pack.report import Subject
from tests.deploy.conftest import CONFIGS, record_of
from tests.oci.test_signing import public_pem
from tests.reports.reports import make_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.report import Report
    from tests.oci.registry import Registry


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GEMMA_PACK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(referrers, "SETTLE_S", 0.0)


@pytest.fixture
def pushed(registry: Registry, raw_checkpoint: Callable[..., Path]) -> Any:
    """Return what pushing a checkpoint with the record and config of Gemma 3 270M answered; its tag is `1.0`."""
    directory = raw_checkpoint("gemma", files={"config.json": json.dumps(CONFIGS["gemma-3-270m"])})
    record_of("google/gemma-3-270m", 307_000_000).write(directory)
    assert Checkpoint.open(directory).size_bytes < 10_000  # so that 307 MB can only come from the record
    result = push(directory, f"{registry.host}/team/gemma:1.0", reporter=Console("quiet"))
    attach_report(parse_reference(result.pinned), passing_report())
    return result


def passing_report() -> Report:
    """Return a report on the variant that `record_of` describes."""
    subject = Subject(recipe="w4a16", recipe_sha256="0" * 64, scheme="int4", size_bytes=307_000_000, files=())
    return make_report(subject=subject)


def test_a_tag_becomes_the_digest_it_names(pushed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["deploy", pushed.reference, "--target", "kserve"]) == 0
    captured = capsys.readouterr()
    runtime, service = yaml.safe_load_all(captured.out)
    model = service["spec"]["predictor"]["model"]
    assert (runtime["kind"], service["kind"]) == ("ServingRuntime", "InferenceService")
    assert model["storageUri"] == f"oci://{pushed.pinned}"
    assert "--max-model-len=32768" in model["args"]
    assert "tag 1.0" in captured.out
    assert "hint: curl http://127.0.0.1:8080/v1/chat/completions" in captured.err


def test_a_pinned_reference_gives_the_same_but_for_the_tag(pushed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for reference in (pushed.reference, pushed.pinned):
        assert run(["deploy", str(reference), "--target", "kserve"]) == 0
        outputs.append(capsys.readouterr().out)
    by_tag, by_digest = outputs
    assert by_tag.replace(" (tag 1.0 when this was written)", "") == by_digest


@pytest.mark.parametrize("target", ["vllm", "rhaiis", "rhelai", "kserve"])
def test_every_target_prints_and_writes_the_same_files(
    pushed: Any, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "serving"
    arguments = ["deploy", pushed.reference, "--target", target, "--max-model-len", "2048", "--gpu-memory", "24.5"]
    arguments += ["--name", "poet"] if target != "rhelai" else []  # ilab names a model by its directory
    assert run([*arguments, "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert run([*arguments, "-o", str(output)]) == 0
    captured = capsys.readouterr()
    assert {path.name: path.read_text("utf-8") for path in output.iterdir()} == printed["files"]
    assert captured.out.splitlines() == [str(output / name) for name in printed["files"]]
    assert printed["reference"] == pushed.pinned
    assert printed["resources"]["weights_bytes"] == 307_000_000
    assert printed["resources"]["max_model_len"] == 2048
    again, *steps = printed["steps"]
    assert all(f"hint: {step.replace('serving', str(output))}" in captured.err for step in steps)
    assert run([*shlex.split(again, comments=True)[1:-1], str(tmp_path / "again")]) == 0
    assert {path.name: path.read_text("utf-8") for path in (tmp_path / "again").iterdir()} == printed["files"]
    assert not [path for path in tmp_path.iterdir() if ".partial-" in path.name]


def test_the_directory_is_what_kubectl_applies(pushed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "my serving"
    assert run(["deploy", pushed.reference, "--target", "kserve", "-o", str(output), "--pull-secret", "key"]) == 0
    assert f"kubectl apply -k '{output}'" in capsys.readouterr().err
    listed = yaml.safe_load((output / "kustomization.yaml").read_text("utf-8"))["resources"]
    beside = {"kustomization.yaml", "pull-secret.yaml", "llm-inference-service.yaml", "prepull.yaml", "smoke.yaml"}
    assert {path.name for path in output.iterdir()} == {*listed, *beside}


def test_what_is_in_the_way_is_refused_before_the_registry_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine", "utf-8")
    unreachable = "127.0.0.1:1/team/gemma:1"
    assert run(["deploy", unreachable, "--target", "vllm", "-o", str(tmp_path)]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert run(["deploy", unreachable, "--target", "vllm", "--name", "Not A Name"]) == 2
    assert "no name for a service" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--target", "vllm", "--max-model-len", "40000"], 2, "context of 32768 tokens, not 40000"),
        (["--target", "kserve", "--gpu-memory", "1"], 2, "needs"),
        (["--target", "rhaiis", "--pull-secret", "key"], 2, "rhaiis has no use for --pull-secret"),
        (["--target", "openshift"], 2, "kserve"),
        ([], 2, "--target"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    pushed: Any, arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["deploy", pushed.reference, *arguments]) == code
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_an_image_that_is_not_there(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["deploy", f"{registry.host}/team/nothing:1", "--target", "vllm"]) == 1
    assert "nothing" in capsys.readouterr().err


def test_a_variant_without_a_report_is_refused_unless_that_is_allowed(
    registry: Registry, raw_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = raw_checkpoint("gemma", files={"config.json": json.dumps(CONFIGS["gemma-3-270m"])})
    result = push(directory, f"{registry.host}/team/gemma:1.0", reporter=Console("quiet"))
    assert run(["deploy", result.reference, "--target", "vllm"]) == 1
    captured = capsys.readouterr()
    assert f"error: {result.pinned} has no validation report" in captured.err
    assert f"gemma-pack validate {result.pinned} attaches one" in captured.err
    assert captured.out == ""
    assert run(["deploy", result.reference, "--target", "vllm", "--allow-unvalidated", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "warning: nothing in the image says that the variant was validated against its base\n"
    assert "vllm serve" in captured.out


@pytest.mark.parametrize(("verdict", "code"), [("fail", 10), ("undecided", 11)])
def test_a_report_without_a_pass_is_a_verdict_of_its_own(
    pushed: Any, verdict: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = passing_report().model_copy(update={"verdict": verdict})
    attach_report(parse_reference(pushed.pinned), changed)
    expected = code if verdict == "fail" else 0  # the report that passed decides where another could not
    assert run(["deploy", pushed.reference, "--target", "vllm"]) == expected
    capsys.readouterr()
    assert run(["deploy", pushed.reference, "--target", "kserve", "--allow-unvalidated"]) == 0
    captured = capsys.readouterr()
    assert ("# Validation: fail" in captured.out) == (verdict == "fail")


def test_with_a_key_only_what_it_signed_counts(pushed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = SigningKey(ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "my.pub").write_bytes(public_pem(key))
    arguments = ["deploy", pushed.reference, "--target", "kserve", "--verify-key", str(tmp_path / "my.pub")]
    assert run(arguments) == 1
    assert "no validation report that is signed with that key" in capsys.readouterr().err
    attach_report(parse_reference(pushed.pinned), passing_report(), key=key)
    assert run(arguments) == 0
    assert f"# Report signed by: key {key.public.key_id}" in capsys.readouterr().out


def test_a_key_that_signed_nothing_is_refused_whatever_else_is_allowed(
    pushed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = SigningKey(ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "other.pub").write_bytes(public_pem(key))
    arguments = ["deploy", pushed.reference, "--target", "kserve", "--verify-key", str(tmp_path / "other.pub")]
    assert run([*arguments, "--allow-unvalidated"]) == 1
    captured = capsys.readouterr()
    assert "signature of this image by that key" in captured.err
    assert captured.out == ""
    attach_report(parse_reference(pushed.pinned), passing_report().model_copy(update={"verdict": "fail"}), key=key)
    assert run([*arguments, "--allow-unvalidated"]) == 0


def test_the_artifact_is_for_rhelai_alone(
    registry: Registry, raw_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"config.json": json.dumps(CONFIGS["gemma-3-270m"]), "generation_config.json": '{"a": 1}'}
    directory = raw_checkpoint("gemma", files=files)
    record_of("google/gemma-3-270m", 307_000_000).write(directory)
    layout = package(directory, directory.with_suffix(".oci"), kind="artifact", reporter=Console("quiet")).layout
    result = push(layout, f"{registry.host}/team/gemma:raw", reporter=Console("quiet"))
    attach_report(parse_reference(result.pinned), passing_report())
    reference = result.reference
    assert run(["deploy", reference, "--target", "kserve"]) == 2
    assert "an artifact of raw files" in capsys.readouterr().err
    assert run(["deploy", reference, "--target", "rhelai"]) == 0
    assert f"ilab takes {registry.host} for a tag" in capsys.readouterr().out  # so gemma-pack pulls it


def test_options_come_from_variables(
    pushed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GEMMA_PACK_DEPLOY_TARGET", "vllm")
    monkeypatch.setenv("GEMMA_PACK_DEPLOY_MAX_MODEL_LEN", "1234")
    assert run(["deploy", pushed.reference]) == 0
    assert "--max-model-len=1234" in capsys.readouterr().out


def test_the_choices_and_defaults_of_the_help_are_those_of_the_stage() -> None:
    from gemma_pack.commands.deploy import command

    defaults = {parameter.name: parameter.default for parameter in command.params}
    assert tuple(MAKERS) == TARGETS
    assert SCHEMES == STORAGE_SCHEMES
    assert defaults["gpu_memory"] * 10**9 == GPU_MEMORY_BYTES


def test_it_works_without_torch(pushed: Any) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from gemma_pack.commands import run; "
        f"sys.exit(run(['deploy', '{pushed.reference}', '--target', 'kserve', '--quiet']))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60).returncode == 0
