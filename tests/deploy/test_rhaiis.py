"""Red Hat AI Inference Server: the podman line as podman reads it, and the same in the unit."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import tempfile
from typing import TYPE_CHECKING

import pytest

from gemma_pack.console import Console
from gemma_pack.deploy.options import Options
from gemma_pack.deploy.resources import Demand, plan_resources
from gemma_pack.deploy.rhaiis import SERVER_IMAGE, rhaiis_bundle
from gemma_pack.errors import InvalidUsageError
from tests.deploy.conftest import record_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.deploy.bundle import Bundle
    from gemma_pack.deploy.image import ServedImage

FAKE_PODMAN = """\
#!/usr/bin/env python3
import json, os, sys
if sys.argv[1:3] == ["image", "exists"]:
    sys.exit(0 if os.environ.get("WEIGHTS") == "here" else 1)
print(json.dumps(sys.argv[1:]))
"""


def bundle_of(image: ServedImage, **options: str) -> Bundle:
    return rhaiis_bundle(image, plan_resources(image, Demand()), Options(name="poet", **options))


@pytest.fixture
def podman_calls(tmp_path: Path) -> Callable[..., list[list[str]]]:
    """Return a function that runs run.sh of a bundle and returns the arguments of each podman call it makes."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "podman").write_text(FAKE_PODMAN, "utf-8")
    (programs / "podman").chmod(0o755)

    def run(bundle: Bundle, *arguments: str, weights: str = "here") -> list[list[str]]:
        (tmp_path / "run.sh").write_text(bundle.files[0].text, "utf-8")
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "WEIGHTS": weights}
        output = subprocess.run(
            ["sh", "run.sh", *arguments],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout
        return [json.loads(line) for line in output.splitlines()]

    return run


def unit_of(bundle: Bundle) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, delimiters=["="])
    unit.optionxform = str  # type: ignore[assignment, method-assign] - systemd's keys have capitals
    unit.read_string(bundle.files[1].text)
    return unit


def test_the_image_is_mounted_and_served(
    served: Callable[..., ServedImage], podman_calls: Callable[..., list[list[str]]]
) -> None:
    image = served("gemma-2-9b-it")
    [arguments] = podman_calls(bundle_of(image))
    assert arguments[:3] == ["run", "--rm", "--name=poet"]
    assert f"--mount=type=image,source={image.reference},destination=/modelcar" in arguments
    assert {"--device=nvidia.com/gpu=all", "--shm-size=2g", "--cap-drop=all", "--env=HF_HUB_OFFLINE=1"} < set(arguments)
    server = arguments.index(SERVER_IMAGE)
    assert arguments[server - 1] == "--entrypoint=vllm"
    assert arguments[server + 1 : server + 5] == ["serve", "/modelcar/models", "--port=8000", "--dtype=bfloat16"]
    assert "--max-model-len=8192" in arguments[server:]


def test_weights_are_pulled_where_they_are_not(
    served: Callable[..., ServedImage], podman_calls: Callable[..., list[list[str]]]
) -> None:
    pull, run = podman_calls(bundle_of(served()), weights="elsewhere")
    assert pull == ["pull", served().reference]
    assert run[0] == "run"


def test_a_directory_is_mounted_read_only_with_its_label(
    served: Callable[..., ServedImage], podman_calls: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    directory = tmp_path / "my models"
    directory.mkdir()
    [arguments] = podman_calls(bundle_of(served()), "my models", weights="elsewhere")
    assert f"--volume={directory}:/modelcar/models:ro,Z" in arguments
    assert not any(argument.startswith("--mount") for argument in arguments)


def test_the_unit_runs_the_same_container(
    served: Callable[..., ServedImage], podman_calls: Callable[..., list[list[str]]]
) -> None:
    bundle = bundle_of(served())
    container = unit_of(bundle)["Container"]
    [arguments] = podman_calls(bundle)
    server = arguments.index(SERVER_IMAGE)
    assert container["Image"] == SERVER_IMAGE
    assert shlex.split(container["Exec"]) == arguments[server + 1 :]
    assert f"--mount={container['Mount']}" in arguments
    assert container["PodmanArgs"] in arguments
    assert f"--device={container['AddDevice']}" in arguments
    assert f"--shm-size={container['ShmSize']}" in arguments
    assert f"--publish={container['PublishPort']}" in arguments
    assert [f"--env={pair}" for pair in container["Environment"].split()] == [a for a in arguments if "--env=" in a]
    assert bundle.files[1].name == "poet.container"


def test_quadlet_knows_every_key(served: Callable[..., ServedImage]) -> None:
    """It refuses a unit with a key that it does not know (podman, pkg/systemd/quadlet, `checkForUnknownKeys`)."""
    bundle = bundle_of(served())
    container = unit_of(bundle)["Container"]
    assert set(container) <= QUADLET_KEYS
    kind, source, destination = container["Mount"].split(",")
    assert (kind, destination) == ("type=image", "destination=/modelcar")
    assert not source.endswith((".image", ".volume"))  # quadlet would look for a unit of that name
    assert "podman 4.7 or later" in bundle.files[1].text


QUADLET_KEYS = {
    "AddDevice", "ContainerName", "DropCapability", "Environment", "Exec", "Image", "Mount", "NoNewPrivileges",
    "PodmanArgs", "PublishPort", "ShmSize",
}  # fmt: skip
"""Of [Container], those of podman 4.7 that we use: ShmSize is the youngest (podman-systemd.unit(5) of 4.7)."""


def test_podman_knows_every_option(
    served: Callable[..., ServedImage], podman_calls: Callable[..., list[list[str]]], tool: Callable[[str], str]
) -> None:
    told = subprocess.run([tool("podman"), "run", "--help"], check=True, capture_output=True, text=True, timeout=30)
    known = set(re.findall(r"--[a-z-]+", told.stdout))
    [arguments] = podman_calls(bundle_of(served()))
    ours = arguments[: arguments.index(SERVER_IMAGE)]
    assert {word.partition("=")[0] for word in ours if word.startswith("--")} <= known


def test_the_unit_pulls_before_it_starts(served: Callable[..., ServedImage]) -> None:
    service = unit_of(bundle_of(served()))["Service"]
    reference = served().reference
    assert shlex.split(service["ExecStartPre"]) == [
        "/bin/sh",
        "-c",
        f"podman image exists {reference} || podman pull {reference}",
    ]


def test_a_record_cannot_add_to_the_unit(served: Callable[..., ServedImage]) -> None:
    image = served(record=record_of("google/gemma\n[Service]\nExecStart=/bin/false", 1))
    unit = unit_of(bundle_of(image))
    assert unit.sections() == ["Unit", "Container", "Service", "Install"]
    assert "ExecStart" not in unit["Service"]


def test_the_login_is_for_the_servers_registry(served: Callable[..., ServedImage]) -> None:
    assert bundle_of(served()).steps[0] == "podman login registry.redhat.io"
    assert bundle_of(served(), server_image="quay.io/team/vllm:1").steps[0] == "podman login quay.io"


def test_options_of_other_targets_are_refused(served: Callable[..., ServedImage]) -> None:
    with pytest.raises(InvalidUsageError, match="--target rhaiis has no use for --storage-scheme"):
        bundle_of(served(), storage_scheme="oci+native")


def test_podman_takes_the_line(
    served: Callable[..., ServedImage],
    podman_calls: Callable[..., list[list[str]]],
    raw_checkpoint: Callable[..., Path],
    tool: Callable[[str], str],
    tmp_path: Path,
) -> None:
    """Podman creates the container, which reads every option and mounts the weights; starting it takes a GPU."""
    from gemma_pack.oci.package import package

    podman = tool("podman")
    if os.geteuid() != 0:
        pytest.skip("the storage of containers needs root")
    layout = package(raw_checkpoint(), tmp_path / "layout", reporter=Console("quiet")).layout
    with tempfile.TemporaryDirectory(prefix="store-") as place:  # podman takes 50 characters
        storage = ["--root", f"{place}/root", "--runroot", f"{place}/run", "--storage-driver", "vfs"]

        def call(*arguments: str) -> str:
            command = [podman, *storage, "--cgroup-manager=cgroupfs", *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()

        weights = call("pull", "--quiet", f"oci:{layout}")
        call("tag", weights, SERVER_IMAGE)
        [(_, *arguments)] = podman_calls(bundle_of(served()))
        container = call("create", *[argument.replace(served().reference, weights) for argument in arguments])
        created = json.loads(call("inspect", container))[0]
    assert created["Config"]["Entrypoint"] in ("vllm", ["vllm"])  # podman 5 lists its words
    assert created["Config"]["Cmd"][:2] == ["serve", "/modelcar/models"]
    assert created["HostConfig"]["ShmSize"] == 2 << 30
    [mount] = [mount for mount in created["Mounts"] if mount["Destination"] == "/modelcar"]
    assert (mount["Type"], mount["Source"]) == ("image", weights)


def test_a_model_that_the_server_is_too_old_for_is_warned_of(served: Callable[..., ServedImage]) -> None:
    """Red Hat AI Inference 3.4.0 has vLLM 0.18, Gemma 4 came with 0.19."""
    config = {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}}
    image = served(config=config)
    assert any("--server-image" in warning for warning in bundle_of(image).warnings)
    assert bundle_of(image, server_image="registry.redhat.io/rhaii/vllm-cuda-rhel9:3.5.1").warnings == ()
    assert bundle_of(served()).warnings == ()
