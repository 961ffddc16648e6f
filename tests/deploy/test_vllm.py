"""The scripts for an installed vLLM: run for real against a stand-in that says what it was asked."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gemma_pack.deploy.options import Options
from gemma_pack.deploy.resources import Demand, plan_resources
from gemma_pack.deploy.vllm import vllm_bundle
from gemma_pack.errors import InvalidUsageError
from tests.deploy.conftest import record_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.deploy.bundle import Bundle
    from gemma_pack.deploy.image import ServedImage

SAYS_ITS_ARGUMENTS = '#!/bin/sh\necho "$(basename "$0")" "$@" HF_HUB_OFFLINE="$HF_HUB_OFFLINE"\n'
PULLS = '#!/bin/sh\n[ "$1 $3" = "pull -o" ] && mkdir "$4" && echo "pulled $2"\n'
FAKE_VLLM = """\
class SamplingParams:
    def __init__(self, **settings): self.settings = settings
class LLM:
    def __init__(self, **settings): print("LLM", settings)
    def generate(self, prompt, params): return self._answer("generate", prompt, params)
    def chat(self, messages, params): return self._answer("chat", messages, params)
    def _answer(self, kind, asked, params):
        print(kind, asked, params.settings)
        answer = type("Answer", (), {"outputs": [type("Output", (), {"text": "an answer"})]})
        return [answer]
"""


def bundle_of(image: ServedImage, **demand: int) -> Bundle:
    return vllm_bundle(image, plan_resources(image, Demand(**demand)), Options(name="poet"))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a file of a bundle with stand-ins for vllm and gemma-pack; it returns the output."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"vllm": SAYS_ITS_ARGUMENTS, "gemma-pack": PULLS}.items():
        (programs / name).write_text(text, "utf-8")
        (programs / name).chmod(0o755)
    (programs / "vllm.py").write_text(FAKE_VLLM, "utf-8")

    def start(bundle: Bundle, name: str, **variables: str) -> str:
        [text] = [file.text for file in bundle.files if file.name == name]
        (tmp_path / name).write_text(text, "utf-8")
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(programs), **variables}
        command = ["sh" if name.endswith(".sh") else sys.executable, name]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=30
        ).stdout

    return start


def test_the_server_starts_on_what_was_pulled(served: Callable[..., ServedImage], run: Callable[..., str]) -> None:
    image = served("gemma-3-27b-it")
    bundle = bundle_of(image, max_model_len=4096, gpu_memory_bytes=40_000_000_000)
    line = (
        "vllm serve poet-5d5d5d5d5d5d --host=127.0.0.1 --port=8000 --dtype=bfloat16 --served-model-name=poet "
        "--max-model-len=4096 --gpu-memory-utilization=0.9 --tensor-parallel-size=2 HF_HUB_OFFLINE=1"
    )
    assert run(bundle, "serve.sh").splitlines() == [f"pulled {image.reference}", line]
    assert run(bundle, "serve.sh").splitlines() == [line]  # nothing is pulled twice


def test_another_image_of_the_repository_is_another_directory(
    served: Callable[..., ServedImage], run: Callable[..., str]
) -> None:
    first = served()
    second = served(reference=first.reference.partition("@")[0] + "@sha256:" + "1" * 64)
    for image in (first, second, first):  # an earlier one must not be served under the name of a later
        assert f"vllm serve poet-{image.reference[-64:][:12]} " in run(bundle_of(image), "serve.sh")
    assert f"pulled {second.reference}" not in run(bundle_of(second), "generate.py")  # serve.sh has


def test_a_directory_elsewhere_is_served_where_it_is(
    served: Callable[..., ServedImage], run: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "my models").mkdir()
    output = run(bundle_of(served()), "serve.sh", MODEL_DIRECTORY="my models")
    assert output.startswith("vllm serve my models ")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("gemma-3-270m", "generate Write me a poem about Machine Learning."),
        ("gemma-2-9b-it", "chat [{'role': 'user', 'content': 'Write me a poem about Machine Learning.'}]"),
    ],
)
def test_the_script_asks_as_the_model_was_trained(
    served: Callable[..., ServedImage], run: Callable[..., str], name: str, asked: str
) -> None:
    image = served(name)
    lines = run(bundle_of(image, max_model_len=1024), "generate.py").splitlines()
    assert f"pulled {image.reference}" in lines
    assert (
        "LLM {'model': 'poet-5d5d5d5d5d5d', 'dtype': 'bfloat16', 'max_model_len': 1024, 'gpu_memory_utilization': 0.9, "
        "'tensor_parallel_size': 1, 'max_num_batched_tokens': 8192}"
    ) in lines
    assert f"{asked} {{'temperature': 0, 'max_tokens': 64}}" in lines
    assert "an answer" in lines


@pytest.mark.parametrize("breaking", ["\n", "\r", "\u2028", "\x0c"])
def test_a_record_cannot_add_a_command(
    served: Callable[..., ServedImage], run: Callable[..., str], breaking: str
) -> None:
    image = served(record=record_of(f"google/gemma-3-270m{breaking}echo pwned", 1, note=f"{breaking}print('pwned')"))
    for name in ("serve.sh", "generate.py"):
        assert "pwned" not in run(bundle_of(image), name)


def test_options_of_other_targets_are_refused(served: Callable[..., ServedImage]) -> None:
    image = served()
    with pytest.raises(InvalidUsageError, match="--target vllm has no use for --server-image"):
        vllm_bundle(image, plan_resources(image, Demand()), Options(server_image="a"))
