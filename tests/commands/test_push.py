"""`gemma-pack push`: options in, result out, the exit codes that a CI job acts on, and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from gemma_pack.commands import run
from gemma_pack.oci.layout import Layout
from gemma_pack.record import Record, SourceRecord
from tests.oci.faulty import Fault, Faulty, say
from tests.oci.registry import PASSWORD, USER, running_registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oci.registry import Registry


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GEMMA_PACK_")]:
        monkeypatch.delenv(name)


def test_it_says_what_was_sent_and_what_to_deploy(
    registry: Registry, random_layout: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    source = random_layout()
    digest = Layout.open(source).root.digest
    assert run(["push", str(source), f"{registry.host}/team/gemma:1"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["uploaded", "already there", "mounted"]
    assert lines[0].endswith("MB")
    assert lines[1].endswith(" 0 B")
    assert lines[4] == f"{registry.host}/team/gemma@{digest}"
    assert lines[5].startswith(f"pushed as {registry.host}/team/gemma:1 in ")
    assert lines[5].endswith("/s")
    assert f"pushing to {registry.host}: " in captured.err
    assert "(100 %)" in captured.err


def test_json_holds_the_whole_result(
    registry: Registry, random_layout: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    source = str(random_layout())
    for variant in ("base", "variant"):
        arguments = ["push", source, f"{registry.host}/team/{variant}:1", "--mount-from", "team/base"]
        assert run([*arguments, "--format", "json"]) == 0
        captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["pinned"] == f"{registry.host}/team/variant@{result['digest']}"
    assert result["mounted_bytes"] == result["size_bytes"] > 0
    assert result["uploaded_bytes"] == result["existed_bytes"] == 0
    assert captured.err == ""


def test_the_digest_is_left_in_a_file_when_all_is_done_and_only_then(
    registry: Registry, random_layout: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = random_layout()
    kept = tmp_path / "new" / "digest"
    push = ["push", str(source), f"{registry.host}/team/gemma:1", "--digest-file"]
    assert run([*push, str(kept)]) == 0
    assert kept.read_text("utf-8") == Layout.open(source).root.digest
    assert run(["push", str(tmp_path / "nothing"), *push[2:], str(kept)]) == 2
    assert not kept.exists(), "it would name an image that this push did not send"
    assert run([*push, str(source / "index.json" / "digest")]) == 2
    assert "choose another place with --digest-file" in capsys.readouterr().err


def test_a_digest_file_that_is_a_link_or_a_pipe_stays_one(
    registry: Registry, random_layout: Callable[..., Path], tmp_path: Path
):
    source = random_layout()
    digest = Layout.open(source).root.digest
    push = ["push", str(source), f"{registry.host}/team/gemma:1", "--digest-file"]
    link, target, pipe = tmp_path / "link", tmp_path / "target", tmp_path / "pipe"
    target.write_text("an earlier one, which is far longer than any digest of sha256 with its name in front" * 2)
    link.symlink_to(target)
    assert run([*push, str(link)]) == 0
    assert link.is_symlink()
    assert target.read_text() == digest
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        assert run([*push, str(pipe)]) == 0
        assert read.result(30) == digest
    assert pipe.is_fifo()


@pytest.mark.parametrize("both", [False, True])
def test_a_digest_for_stdout_comes_in_its_turn(
    registry: Registry, random_layout: Callable[..., Path], tmp_path: Path, both: bool
):
    source = random_layout()
    command = [sys.executable, "-m", "gemma_pack", "push", str(source), f"{registry.host}/team/gemma:1"]
    with (tmp_path / "log").open("w") as log:
        errors = log if both else subprocess.DEVNULL
        subprocess.run([*command, "--digest-file", "/dev/stdout"], stdout=log, stderr=errors, check=True, timeout=60)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines.count(Layout.open(source).root.digest) == 1
    assert any(line.startswith("uploaded ") for line in lines)
    assert any("hint: gemma-pack deploy" in line for line in lines) is both
    assert "\0" not in (tmp_path / "log").read_text()


def test_a_push_that_fails_leaves_no_earlier_digest_behind_a_link(
    faulty: Faulty, random_layout: Callable[..., Path], tmp_path: Path
):
    target = tmp_path / "digest"
    target.write_text("sha256:earlier")
    (tmp_path / "link").symlink_to(target)
    faulty.faults = [Fault("POST", "", say(422), times=9)]
    command = ["push", str(random_layout()), f"{faulty.host}/team/gemma:1", "--digest-file", str(tmp_path / "link")]
    assert run(command) == 1
    assert target.read_text() == ""


def test_an_image_for_another_platform_than_ours_gets_its_documents_too(
    registry: Registry, raw_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    reference = f"{registry.host}/team/gemma:1"
    directory = raw_checkpoint()
    Record(source=SourceRecord(kind="directory", model_id="a", files=())).write(directory)
    assert run(["push", str(directory), reference, "--base", "none", "--platform", "linux/s390x"]) == 0
    assert "attached: sbom" in capsys.readouterr().out


def test_options_come_from_variables(
    faulty: Faulty, random_layout: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GEMMA_PACK_PUSH_MOUNT_FROM", "team/base")
    assert run(["push", str(random_layout(size_bytes=1000)), f"{faulty.host}/a/b:1"]) == 0
    assert any("from=team%2Fbase" in seen.query for seen in faulty.seen)


def test_a_login_is_wanted_then_found(
    no_logins: None,
    tool: Callable[[str], str],
    tmp_path: Path,
    random_layout: Callable[..., Path],
    store_login: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
):
    del no_logins
    (tmp_path / "registry").mkdir()
    source = str(random_layout(size_bytes=1000))
    with running_registry(tool("docker-registry"), tmp_path / "registry", "login") as registry:
        target = f"{registry.host}/team/gemma:1"
        assert run(["push", source, target]) == 13
        assert f"hint: podman login {registry.host}" in capsys.readouterr().err
        store_login(registry.host, "wrong words")
        assert run(["push", source, target]) == 13
        assert "wrong words" not in capsys.readouterr().err
        assert (USER, PASSWORD) == ("hilbert", "open sesame")
        store_login(registry.host)
        assert run(["push", source, target]) == 0


def test_nobody_there_is_14(free_port: int, random_layout: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    assert run(["push", str(random_layout(size_bytes=1000)), f"127.0.0.1:{free_port}/a/b:1"]) == 14
    assert f"127.0.0.1:{free_port} cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [("https://quay.io/a/b", "is a URL"), ("quay.io/A/b", "is not a repository"), ("quay.io/a/b:", "is not a tag")],
)
def test_a_broken_reference_is_2(
    random_layout: Callable[..., Path], capsys: pytest.CaptureFixture[str], reference: str, sentence: str
):
    assert run(["push", str(random_layout(size_bytes=1000)), reference]) == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_source_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["push", str(tmp_path / "absent"), "quay.io/a/b"]) == 2
    assert "neither an OCI layout nor a checkpoint" in capsys.readouterr().err


def test_a_registry_that_refuses_is_1_with_its_reason(
    faulty: Faulty, random_layout: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    reason = {"errors": [{"code": "NAME_INVALID", "message": "no such project"}]}
    faulty.faults = [Fault("POST", "", say(422, body=json.dumps(reason).encode()), times=9)]
    assert run(["push", str(random_layout(size_bytes=1000)), f"{faulty.host}/a/b:1", "--format", "json"]) == 1
    error = json.loads(capsys.readouterr().err)["error"]
    assert "NAME_INVALID no such project" in error["message"]
    assert error["exit_code"] == 1


def test_torch_is_not_needed():
    code = (
        "import sys; from gemma_pack.commands import run; import gemma_pack.oci.push; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_comes_next_is_for_an_image_or_an_artifact(
    registry: Registry, raw_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    directory = raw_checkpoint()
    assert run(["package", str(directory), "--layout", "both"]) == 0
    for layout, hint in (
        (f"{directory}.oci", "gemma-pack deploy "),
        (f"{directory}.artifact.oci", f"ilab model download --repository docker://{registry.host}/a/b --release 1"),
    ):
        capsys.readouterr()
        assert run(["push", layout, f"{registry.host}/a/b:1"]) == 0
        assert f"hint: {hint}" in capsys.readouterr().err


def test_a_tag_that_is_fixed_may_be_pushed_again_and_gets_what_is_missing(
    faulty: Faulty,
    raw_checkpoint: Callable[..., Path],
    random_layout: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
):
    """Harbor and ECR refuse a tag that exists, even for the digest that it names."""
    variant, reference = raw_checkpoint(), f"{faulty.host}/team/gemma:1"
    Record(source=SourceRecord(kind="directory", model_id="a", files=())).write(variant)
    assert run(["push", str(variant), reference, "--no-referrers"]) == 0
    refused = say(412, {}, b'{"errors": [{"code": "PRECONDITION", "message": "the tag is immutable"}]}')
    faulty.faults = [Fault("PUT", "manifests/1$", refused, times=999)]
    capsys.readouterr()
    assert run(["push", str(variant), reference, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["attached"]
    other = str(random_layout("other", size_bytes=1000))
    assert run(["push", other, reference]) == 1
    assert "the tag is immutable" in capsys.readouterr().err
