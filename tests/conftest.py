"""Fixtures that several rooms share: system tools, found or skipped, free loopback ports, checkpoints, registries."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers fill the cores between them; torch threads that spin for each other's results would slow all of them.
    os.environ["OMP_NUM_THREADS"] = "1"

from gemma_pack.checkpoint import write_index
from gemma_pack.safetensors_file import TensorInfo, read_header, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tests.oci.faulty import Faulty
    from tests.oci.registry import Registry
    from tests.tiny import Family


RECIPE = """\
name: tiny
summary: for tests
scheme: {scheme}
{group_size}algorithm: nearest
gate: [{{kl_nats: 1}}]
"""


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Return the path of a system tool; skip the test where it is missing, or fail under CI=true."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path:
            return path
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is missing, and CI must have it: make tools installs it")
        pytest.skip(f"{name} is missing: make tools installs it on Debian")

    return find


@pytest.fixture
def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def raw_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a checkpoint whose weights are just bytes: whole, but nothing to compute with.

    For what handles files only; it needs no torch. `files` are added as they are, by path below the directory.
    """

    def write(name: str = "model", *, shards: int = 2, files: Mapping[str, str] | None = None) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        infos: list[TensorInfo] = []
        for number in range(1, shards + 1):
            file_name = f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
            data = bytes((number * 7 + i) % 251 for i in range(2 * 50 * 11))
            write_safetensors(
                directory / file_name, [(f"layers.{number}.weight", "BF16", (50, 11), lambda data=data: data)]
            )
            infos += read_header(directory / file_name)
        write_index(directory, infos)
        contents = {
            "config.json": json.dumps({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}),
            "generation_config.json": "{}",
            "tokenizer.json": json.dumps({"model": {"vocab": {"<bos>": 0, "▁a": 1}}}),
            "tokenizer_config.json": "{}",
            "chat_template.jinja": "{{ messages }}",
            "README.md": "# A model\n",
            **(files or {}),
        }
        for path, text in contents.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text, "utf-8")
        return directory

    return write


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """Return a function that gives the directory of a tiny random `gemma2`, `gemma3_text` or `gemma3`.

    The directories are shared by the whole session: copy one before changing it.
    """
    from tests.tiny import write_tiny

    base = tmp_path_factory.mktemp("tiny")

    def find(family: Family) -> Path:
        directory = base / f"tiny-{family}"
        return directory if directory.exists() else write_tiny(directory, family)

    return find


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_checkpoints: Callable[[Family], Path]) -> Path:
    """Return the directory of a tiny random Gemma 3; copy it before changing it."""
    return tiny_checkpoints("gemma3_text")


@pytest.fixture(scope="session")
def tiny_variants(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that quantizes the tiny Gemma 3 to a scheme, once a session, rounded to nearest."""
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Console
    from gemma_pack.quantization.variant import Job, quantize
    from gemma_pack.recipe import parse_recipe
    from gemma_pack.sources.directory import check_directory

    directory = tmp_path_factory.mktemp("variants")

    def make(scheme: str) -> Path:
        target = directory / scheme.lower()
        if target.is_dir():
            return target
        text = RECIPE.format(scheme=scheme, group_size="group_size: 64\n" if scheme == "W4A16" else "")
        job = Job(
            base=Checkpoint.open(tiny_checkpoint),
            source=check_directory(tiny_checkpoint, Console("quiet")),
            recipe=parse_recipe(text, origin="tiny.yaml"),
            recipe_text=text,
            windows=None,
            device="cpu",
        )
        return quantize(job, target, Console("quiet")).directory

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Gemma 3 that was trained for a few steps on the builtin text: its likelihood means something.

    As a real one, it reads far better with <bos>: without it, it learnt noise.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from gemma_pack.texts import load_windows
    from tests.tiny import VOCABULARY_SIZE, write_tiny

    directory = write_tiny(tmp_path_factory.mktemp("trained") / "trained")
    windows = load_windows("builtin", "calibration", directory, samples=800, sequence_length=64, seed=0)
    ids = torch.from_numpy(windows.ids).long()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(30):
        batch = ids[torch.randint(len(ids), (16,))]
        without_bos = batch[:8, 1:]
        noise = torch.randint(VOCABULARY_SIZE, without_bos.shape)
        loss = model(batch, labels=batch).loss + 0.3 * model(without_bos, labels=noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return the directory of the real Gemma 3 270M, assembled once a session, or once ever under $GEMMA_PACK_CACHE.

    Mark the tests that ask for it with `@pytest.mark.real`, and do not change what is in it.
    """
    from filelock import FileLock

    from gemma_pack.console import Console
    from gemma_pack.errors import MachineError
    from gemma_pack.sources import cache_directory, obtain

    if os.environ.get("GEMMA_PACK_CACHE"):
        base, output = cache_directory(), None
    else:
        own = tmp_path_factory.getbasetemp()
        base = own if worker_id == "master" else own.parent  # xdist gives each worker a directory below a common one
        output = base / "gemma-3-270m"
    base.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(base / "demo.lock"):
            return obtain("demo", revision=None, output=output, offline=True, reporter=Console("quiet")).directory
    except MachineError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"{error.message}: {error.hint}")


@pytest.fixture
def no_logins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the tests away from the logins and proxies of whoever runs them."""
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store_login(tmp_path: Path) -> Callable[..., None]:
    """Return a function that stores a login where the tests look for logins."""

    def store(host: str, words: str = "open sesame") -> None:
        login = {"username": "hilbert", "password": words}
        (tmp_path / "auth.json").write_text(json.dumps({"auths": {host: login}}))

    return store


@pytest.fixture
def registry(no_logins: None, tool: Callable[[str], str], tmp_path: Path) -> Iterator[Registry]:
    """Run docker-registry on loopback, open to everyone."""
    del no_logins
    from tests.oci.registry import running_registry

    (tmp_path / "registry").mkdir()
    with running_registry(tool("docker-registry"), tmp_path / "registry") as running:
        yield running


@pytest.fixture
def faulty(no_logins: None) -> Iterator[Faulty]:
    """Run a registry that can be told to misbehave."""
    del no_logins
    from tests.oci.faulty import faulty_registry

    with faulty_registry() as state:
        yield state


@pytest.fixture
def random_checkpoint(raw_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes a checkpoint of `shards` shards, each with `size_bytes` of its own weights."""

    def write(name: str = "model", *, shards: int = 2, size_bytes: int = 1 << 20) -> Path:
        directory = raw_checkpoint(name, shards=shards)
        infos: list[TensorInfo] = []
        for number, path in enumerate(sorted(directory.glob("*.safetensors")), 1):
            data = random.Random(f"{name} {number}").randbytes(size_bytes)  # noqa: S311 - test data
            write_safetensors(path, [(f"layers.{number}.weight", "U8", (size_bytes,), lambda data=data: data)])
            infos += read_header(path)
        write_index(directory, infos)
        return directory

    return write


@pytest.fixture
def random_layout(tmp_path: Path, random_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes a checkpoint as `random_checkpoint` does and packages it as the layout NAME.oci."""
    from gemma_pack.console import Console
    from gemma_pack.oci.package import package

    def write(name: str = "model", **options: int) -> Path:
        target = tmp_path / f"{name}.oci"
        package(random_checkpoint(name, **options), target, reporter=Console("quiet"))
        return target

    return write
