"""The real server of the tests: vLLM's CPU build in an environment of its own, serving one model a session."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gemma_pack.deploy.image import ServedImage
from gemma_pack.deploy.options import Options
from gemma_pack.deploy.resources import Demand, plan_resources
from gemma_pack.deploy.vllm import vllm_bundle
from gemma_pack.record import read_record
from tests.real.vllm_server import VllmServer, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_MODEL_LEN = 16384


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


@pytest.fixture(scope="session")
def served_directory(demo_checkpoint: Path) -> Path:
    """Return the directory that the server loads."""
    return demo_checkpoint


@pytest.fixture(scope="session")
def deployed(served_directory: Path) -> dict[str, str]:
    """Return the files of `deploy --target vllm` for that directory by name, for contexts of MAX_MODEL_LEN tokens."""
    image = ServedImage(
        reference=f"localhost/served@sha256:{'0' * 64}",
        tag=None,
        size_bytes=sum(path.stat().st_size for path in served_directory.iterdir()),
        record=read_record(served_directory),
        config=json.loads((served_directory / "config.json").read_text("utf-8")),
    )
    resources = plan_resources(image, Demand(max_model_len=MAX_MODEL_LEN))
    return {file.name: file.text for file in vllm_bundle(image, resources, Options(name="gemma")).files}


@pytest.fixture(scope="session")
def vllm_server(
    served_directory: Path, deployed: dict[str, str], vllm_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """Return vLLM's server with that directory loaded, started with the options that `deploy` wrote."""
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    [line] = [line for line in deployed["serve.sh"].replace("\\\n", " ").splitlines() if "vllm serve" in line]
    arguments = shlex.split(line)[4:]  # after: exec vllm serve "$directory"
    with serving(served_directory, arguments, python=vllm_python, log=log) as server:
        yield server
