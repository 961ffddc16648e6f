"""The real server of the tests: vLLM's CPU build in an environment of its own, serving one model a session."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gemma_pack.deploy.image import ServedImage
from gemma_pack.deploy.options import Options
from gemma_pack.deploy.resources import Demand, plan_resources
from gemma_pack.deploy.vllm import vllm_bundle
from gemma_pack.record import read_record
from tests.oci.registry import running_registry
from tests.real.processor import HAS_INT4, dequantize
from tests.real.vllm_server import AskedServer, serving
from tests.tiny import CHAT_TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_MODEL_LEN = 16384
BUILD_SECONDS = 2700
"""For all of the demo: 300 on a Xeon with AMX, 1700 were seen on a processor without AVX-512."""
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """Return the Python that has vLLM: $GEMMA_PACK_VLLM, or the one that `make test` installs into .venv-vllm.

    Where there is none the test is skipped, and fails under CI=true.
    """
    given = os.environ.get("GEMMA_PACK_VLLM")
    python = Path(given) if given else Path(__file__).parents[2] / ".venv-vllm/bin/python"
    if python.is_file():
        return python
    missing = f"there is no vLLM at {python}: python tests/real/install_vllm.py .venv-vllm makes it"
    if given or os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


@dataclass(frozen=True, slots=True)
class Built:
    """What `gemma-pack build` made of the demo model and pushed to a registry that still runs."""

    work: Path
    environment: dict[str, str]
    arguments: tuple[str, ...]
    stdout: str

    @property
    def variant(self) -> dict[str, Any]:
        """Return the one variant of the result."""
        [variant] = json.loads(self.stdout)["variants"]
        return dict(variant)

    @property
    def directory(self) -> Path:
        """Return the variant's directory."""
        return self.work / self.variant["directory"]

    def gemma_pack(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line where the build ran."""
        command = [sys.executable, "-m", "gemma_pack", *arguments]
        done = subprocess.run(
            command,
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=BUILD_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done

    def run_again(self) -> subprocess.CompletedProcess[str]:
        """Run the same build once more."""
        return self.gemma_pack(*self.arguments)


@pytest.fixture(scope="session")
def demo_build(
    demo_checkpoint: Path, tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Built]:
    """Build examples/demo.yaml as it stands and push the variant to a registry on loopback."""
    work = tmp_path_factory.mktemp("build")
    (work / "registry").mkdir()
    (work / "no-logins").mkdir()
    example = yaml.safe_load((REPOSITORY / "examples/demo.yaml").read_text("utf-8"))
    # the checkpoint that the session has made already; its record still says that it is the demo's
    (work / "demo.yaml").write_text(yaml.safe_dump({**example, "model": str(demo_checkpoint)}), "utf-8")
    with running_registry(tool("docker-registry"), work / "registry") as registry:
        arguments = ("build", "demo.yaml", "--push", f"{registry.host}/gemma-3-270m", "--offline", "--format", "json")
        environment = {**os.environ, "DOCKER_CONFIG": str(work / "no-logins"), "OMP_WAIT_POLICY": "PASSIVE"}
        environment.pop("REGISTRY_AUTH_FILE", None)
        built = Built(work, environment, arguments, stdout="")
        yield replace(built, stdout=built.run_again().stdout)


@pytest.fixture(scope="session")
def pulled_variant(demo_build: Built) -> Path:
    """Return what `pull` wrote of the pushed variant."""
    demo_build.gemma_pack("pull", demo_build.variant["pinned"], "-o", "pulled")
    return demo_build.work / "pulled"


@pytest.fixture(scope="session")
def served_directory(pulled_variant: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory that the server loads: what `pull` wrote, and Gemma's chat template, which a base lacks.

    Where vLLM has no int4 kernel for the processor it gets the same weights in bfloat16.
    """
    directory = tmp_path_factory.mktemp("served") / "gemma"
    shutil.copytree(pulled_variant, directory, copy_function=os.link)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    if not HAS_INT4:
        dequantize(directory)
    return directory


@pytest.fixture(scope="session")
def deployed(served_directory: Path) -> dict[str, str]:
    """Return the files of `deploy --target vllm` for that directory by name, for contexts of MAX_MODEL_LEN tokens."""
    image = ServedImage(
        reference=f"localhost/served@sha256:{'0' * 64}",
        tag=None,
        size_bytes=sum(path.stat().st_size for path in served_directory.iterdir()),
        record=read_record(served_directory),
        config=json.loads((served_directory / "config.json").read_text("utf-8")),
        answers_chat=True,
    )
    resources = plan_resources(image, Demand(max_model_len=MAX_MODEL_LEN))
    return {file.name: file.text for file in vllm_bundle(image, resources, Options(name="gemma")).files}


@pytest.fixture(scope="session")
def vllm_server(
    served_directory: Path, deployed: dict[str, str], vllm_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AskedServer]:
    """Return what `gemma-pack serve` started on that directory, with the options that `deploy` wrote."""
    errors = tmp_path_factory.mktemp("serve") / "stderr"
    [line] = [line for line in deployed["serve.sh"].replace("\\\n", " ").splitlines() if "vllm serve" in line]
    arguments = shlex.split(line)[6:]  # after: exec vllm serve "$directory" --host=… --port=…
    with serving(served_directory, arguments, python=vllm_python, errors=errors) as server:
        yield server
