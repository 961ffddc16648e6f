"""The CI examples: valid by their systems' own schemas, and every call of gemma-pack is one that it understands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
import yaml

from gemma_pack.commands import cli
from tests.deploy import crd
from tests.published import published

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = Path(__file__).parents[2] / "examples" / "ci"
WORKFLOW = EXAMPLES / "github-actions.yaml"
PIPELINE = EXAMPLES / "tekton" / "pipeline.yaml"
VALUES = {
    "MODEL": "google/gemma-2-9b-it", "RECIPE": "w4a16", "REPOSITORY": "ghcr.io/team/gemma", "RUNNER_TEMP": "keys",
    "WORK": "variants/google/gemma-2-9b-it/w4a16",
    "PINNED": "ghcr.io/team/gemma@sha256:" + "0" * 64, "params.model": "google/gemma-2-9b-it",
    "KEYS": "keys", "params.recipe": "w4a16", "params.repository": "ghcr.io/team/gemma", "workspaces.keys.path": "keys",
}  # fmt: skip
IN_ORDER = ["plan", "quantize", "validate", "card", "package", "push", "verify", "deploy"]


def workflow() -> dict[str, Any]:
    parsed: dict[Any, Any] = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    return {"on" if key is True else key: value for key, value in parsed.items()}  # YAML 1.1's idea of a key


def tekton() -> dict[tuple[str, str], dict[str, Any]]:
    objects = yaml.safe_load_all(PIPELINE.read_text("utf-8"))
    return {(one["kind"], one["metadata"]["name"]): one for one in objects}


def workflow_calls() -> list[list[str]]:
    calls = []
    for job in workflow()["jobs"].values():
        for step in job["steps"]:
            calls += script_calls(step.get("run", ""))
    return calls


def script_calls(script: str) -> list[list[str]]:
    calls = []
    for line in map(str.strip, script.splitlines()):
        if line.startswith("gemma-pack "):
            call = re.split(r" \|\| | > ", line)[0]
            calls.append(shlex.split(re.sub(r"\$(\w+)", lambda match: VALUES[match[1]], call)))
    return calls


def pipeline_calls() -> list[list[str]]:
    def filled(word: str) -> str:
        return re.sub(r"\$\(([\w.-]+)\)", lambda match: VALUES[match[1]], word)

    parsed = tekton()
    order = [task["taskRef"]["name"] for task in parsed["Pipeline", "gemma-variants"]["spec"]["tasks"]]
    calls = []
    for step in (step for name in order for step in parsed["Task", name]["spec"]["steps"]):
        calls += script_calls(step["script"]) if "script" in step else [[*step["command"], *map(filled, step["args"])]]
    return calls


CALLS = {"workflow": workflow_calls, "pipeline": pipeline_calls}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_one_that_the_command_line_understands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed by the real commands, not run: an option that was renamed or taken away fails here."""
    monkeypatch.chdir(tmp_path)
    for path in (
        "keys/signing.pem",
        "keys/gemma-pack.pub",
        "gemma-pack.pub",
        "variants/google/gemma-2-9b-it/w4a16/variant/README.md",
        "w4a16/variant/README.md",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    calls = CALLS[name]()
    assert list(dict.fromkeys(call[1] for call in calls)) == IN_ORDER
    with click.Context(cli, info_name="gemma-pack") as context:
        for program, verb, *arguments in calls:
            assert program == "gemma-pack"
            command = cli.get_command(context, verb)
            assert command, verb
            command.make_context(verb, list(arguments), parent=context)
            with pytest.raises(click.UsageError):
                command.make_context(verb, [*arguments, "--no-such-option"], parent=context)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_pushed_without_a_verdict_nor_let_through_without_a_signature(name: str) -> None:
    by_verb = {call[1]: call for call in CALLS[name]()}
    assert "--require-verdict" in by_verb["push"]
    assert "--sign-key" in by_verb["push"]
    assert "--verify-key" in by_verb["deploy"]
    assert "--full" in by_verb["verify"]
    assert by_verb["validate"][by_verb["validate"].index("--report") + 1].endswith("report")


def test_the_workflow_is_valid_by_githubs_schema(tmp_path: Path) -> None:
    def check(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)

    assert check(WORKFLOW).returncode == 0, check(WORKFLOW).stdout
    broken = tmp_path / "broken.yaml"
    broken.write_text(WORKFLOW.read_text("utf-8").replace("runs-on:", "runs_on:"), "utf-8")
    assert check(broken).returncode != 0


def test_the_workflow_goes_on_where_it_stopped() -> None:
    """What is made lies in a place of the model's and the recipe's own, and the checkout leaves it there."""
    job = workflow()["jobs"]["variant"]
    assert job["env"]["WORK"] == "variants/${{ inputs.model }}/${{ matrix.recipe }}"
    [checkout] = [step for step in job["steps"] if "checkout" in step.get("uses", "")]
    assert checkout["with"]["clean"] is False
    work, by_verb = VALUES["WORK"], {call[1]: call for call in workflow_calls()}
    for verb, option, name in (("quantize", "-o", "variant"), ("validate", "--report", "report"),
                               ("package", "-o", "image"), ("push", "--report", "report")):  # fmt: skip
        assert by_verb[verb][by_verb[verb].index(option) + 1] == f"{work}/{name}"
    for verb, name in (("validate", "variant"), ("package", "variant"), ("push", "image")):
        assert by_verb[verb][2] == f"{work}/{name}"
    [kept] = [step for step in job["steps"] if step.get("name") == "Keep the report"]
    assert kept["with"]["path"] == "${{ env.WORK }}/report"


def test_the_workflow_pushes_for_owners_with_capitals(tmp_path: Path) -> None:
    """A registry takes no capital in a repository's name; GitHub takes them in an owner's."""
    written = tmp_path / "env"
    for job in workflow()["jobs"].values():
        names = [step.get("name") for step in job["steps"]]
        [step] = [step for step in job["steps"] if "GITHUB_ENV" in step.get("run", "") and "REPOSITORY" in step["run"]]
        assert step["shell"] == "bash"
        assert names.index(step["name"]) < names.index("Log in to the registry")
        environment = {"REPOSITORY": "ghcr.io/Team/Gemma/variant", "GITHUB_ENV": str(written)}
        subprocess.run(["bash", "-c", step["run"]], env=environment, check=True, timeout=60)
    assert written.read_text("utf-8") == "REPOSITORY=ghcr.io/team/gemma/variant\n" * 2


def test_the_workflow_is_safe_to_copy() -> None:
    parsed = workflow()
    jobs = parsed["jobs"]
    assert parsed["permissions"] == {}
    for job in jobs.values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert "${{" not in step.get("run", "")  # an input is data, never a part of a script
            if "uses" in step:
                assert re.search(r"@[0-9a-f]{40}$", step["uses"])
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
    needed = re.findall(r"secrets\.(\w+)", WORKFLOW.read_text("utf-8"))
    assert set(needed) == {"GITHUB_TOKEN", "HF_TOKEN", "SIGNING_KEY"}
    assert all(job["strategy"]["matrix"] == {"recipe": "${{ fromJSON(inputs.recipes) }}"} for job in jobs.values())
    steps = {step.get("name"): step for job in jobs.values() for step in job["steps"]}
    handed, taken = steps["Hand on the digest"]["with"], steps["Take the digest that was pushed"]["with"]
    assert handed == taken
    assert f"{taken['path']}/pushed.json" in steps["Push"]["run"]
    assert f"{taken['path']}/pushed.json" in steps["Read it"]["run"]


@pytest.fixture(scope="module")
def refused() -> Callable[[dict[str, Any]], list[str]]:
    """Return a function that says what Tekton's published CRD refuses in an object."""
    validators: dict[str, Any] = {}

    def check(manifest: dict[str, Any]) -> list[str]:
        kind = manifest["kind"]
        if kind not in validators:
            path = published(f"tekton-{kind.lower()}.yaml")
            validators[kind] = crd.validator(path, "v1")
        return [f"{error.json_path}: {error.message}" for error in validators[kind].iter_errors(manifest)]

    return check


def test_tekton_takes_every_object(refused: Callable[[dict[str, Any]], list[str]]) -> None:
    parsed = tekton()
    assert {key: refused(manifest) for key, manifest in parsed.items()} == {key: [] for key in parsed}
    task = parsed["Task", "gemma-gate"]
    task["spec"]["steps"][0]["imagge"] = "x"
    assert refused(task)


def test_the_pipeline_gives_each_task_what_it_declares() -> None:
    parsed = tekton()
    pipeline = parsed["Pipeline", "gemma-variants"]["spec"]
    declared = {one["name"] for one in pipeline["params"]}
    for used in pipeline["tasks"]:
        task = parsed["Task", used["taskRef"]["name"]]["spec"]
        given = [*used["params"], *used["matrix"]["params"]]
        assert sorted(one["name"] for one in given) == sorted(one["name"] for one in task["params"])
        assert {one["name"] for one in used["workspaces"]} == {one["name"] for one in task["workspaces"]}
        assert {one["workspace"] for one in used["workspaces"]} <= {one["name"] for one in pipeline["workspaces"]}
        assert set(re.findall(r"\$\(params\.([\w-]+)(?:\[\*\])?\)", str(used))) <= declared
        own = {one["name"] for one in task["params"]}
        assert set(re.findall(r"\$\(params\.([\w-]+)\)", str(task))) <= own
    assert pipeline["tasks"][1]["runAfter"] == [pipeline["tasks"][0]["name"]]


def test_the_pipeline_gates_the_digest_that_it_pushed(tmp_path: Path) -> None:
    """Its scripts, run by sh with a stand-in for gemma-pack that writes down what it was called with."""
    parsed = tekton()
    [push] = [step for step in parsed["Task", "gemma-variant"]["spec"]["steps"] if step["name"] == "push"]
    written = push["args"][push["args"].index("--digest-file") + 1].replace("$(params.recipe)", "w4a16")
    (tmp_path / written).parent.mkdir()
    (tmp_path / written).write_text("sha256:" + "5" * 64, "utf-8")
    program = tmp_path / "bin" / "gemma-pack"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$2" >> asked\n', "utf-8")
    program.chmod(0o755)
    gate = parsed["Task", "gemma-gate"]["spec"]
    environment = {
        "PATH": f"{program.parent}:/usr/bin:/bin",
        "REPOSITORY": "ghcr.io/team/gemma $(touch broken)",
        "RECIPE": "w4a16",
        "KEYS": "keys",
    }
    assert set(environment) - {"PATH"} <= {one["name"] for one in gate["stepTemplate"]["env"]}
    for step in gate["steps"]:
        assert "$(params." not in step["script"]
        done = subprocess.run(["sh", "-c", step["script"]], cwd=tmp_path, env=environment, check=False, timeout=60)
        assert done.returncode == 0
    pinned = f"{environment['REPOSITORY']}@sha256:{'5' * 64}"
    assert (tmp_path / "asked").read_text("utf-8").splitlines() == [pinned, pinned]
    assert not (tmp_path / "broken").exists()
    (tmp_path / written).unlink()
    for step in gate["steps"]:
        done = subprocess.run(["sh", "-c", step["script"]], cwd=tmp_path, env=environment, check=False, timeout=60)
        assert done.returncode != 0, "nothing was pushed, and there is nothing to gate"
