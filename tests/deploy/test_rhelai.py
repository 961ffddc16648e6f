"""RHEL AI: the script, run against an ilab that follows the rules of the real one's download."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from gemma_pack.console import Console
from gemma_pack.deploy.options import Options
from gemma_pack.deploy.resources import Demand, plan_resources
from gemma_pack.deploy.rhelai import rhelai_bundle
from gemma_pack.errors import InvalidUsageError
from gemma_pack.oci.package import package
from gemma_pack.oci.push import push

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.deploy.bundle import Bundle
    from gemma_pack.deploy.image import ServedImage
    from tests.oci.registry import Registry

FAKE_ILAB = """\
#!/usr/bin/env python3
# As instructlab's OCIDownloader: skopeo copies into the cache, titles name the files. $HOST stands for the registry,
# which has no port in the reference because ilab does not take one.
import json, os, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
cache = Path(os.environ["XDG_CACHE_HOME"]) / "instructlab"
if words[:2] == ["model", "serve"]:
    path = Path(words[words.index("--model-path") + 1])
    print(json.dumps({"files": sorted(file.name for file in path.iterdir()), "words": words}))
    sys.exit()
repository, release = words[words.index("--repository") + 1], words[words.index("--release") + 1]
assert repository.count(":") == 1, "ilab takes what follows a second colon for a tag"
name = repository.rsplit("/", 1)[1]
layout, files = cache / "oci" / name, cache / "models" / name
layout.mkdir(parents=True, exist_ok=True)
files.mkdir(parents=True, exist_ok=True)
source = repository.replace("registry.example.com", os.environ["HOST"]) + ":" + release
copy = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", source, f"oci:{layout}", "--remove-signatures"]
subprocess.run(copy, check=True)
index = json.loads((layout / "index.json").read_text())
digest = next(m["digest"] for m in index["manifests"] if m["mediaType"].endswith("image.manifest.v1+json"))
for layer in json.loads((layout / "blobs" / digest.replace(":", "/")).read_text())["layers"]:
    blob = layout / "blobs" / layer["digest"].replace(":", "/")
    (files / layer["annotations"]["org.opencontainers.image.title"]).symlink_to(blob)
"""

PULLS = '#!/bin/sh\n[ "$1 $3" = "pull -o" ] && mkdir -p "$4" && touch "$4/config.json" && echo "pulled $2"\n'


@pytest.fixture
def artifact(
    served: Callable[..., ServedImage], registry: Registry, raw_checkpoint: Callable[..., Path]
) -> ServedImage:
    """Return an artifact that is in the registry, by the name that it would have on port 443."""
    directory = raw_checkpoint("gemma", files={"generation_config.json": '{"a": 1}'})
    layout = package(directory, directory.with_suffix(".oci"), kind="artifact", reporter=Console("quiet")).layout
    digest = push(layout, f"{registry.host}/team/gemma:raw", reporter=Console("quiet")).digest
    return served("gemma-2-9b-it", reference=f"registry.example.com/team/gemma@{digest}", tag="raw", is_artifact=True)


def bundle_of(image: ServedImage, *, gpu_gb: int = 85, **options: str) -> Bundle:
    return rhelai_bundle(image, plan_resources(image, Demand(gpu_memory_bytes=gpu_gb * 10**9)), Options(**options))


def run(bundle: Bundle, directory: Path, host: str) -> subprocess.CompletedProcess[str]:
    (directory / "ilab").write_text(FAKE_ILAB, "utf-8")
    (directory / "ilab").chmod(0o755)
    (directory / "serve.sh").write_text(bundle.files[0].text, "utf-8")
    environment = {
        **os.environ,
        "PATH": f"{directory}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(directory / "my cache"),
        "HOST": host,
    }
    environment.pop("REGISTRY_AUTH_FILE", None)
    return subprocess.run(
        ["sh", "serve.sh"], cwd=directory, env=environment, check=False, capture_output=True, text=True, timeout=60
    )


def test_ilab_downloads_the_files_and_serves_them(
    artifact: ServedImage, registry: Registry, tmp_path: Path, tool: Callable[[str], str]
) -> None:
    tool("skopeo")
    finished = run(bundle_of(artifact), tmp_path, registry.host)
    assert finished.returncode == 0, finished.stderr
    served = json.loads(finished.stdout)
    assert {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors"} <= set(served["files"])
    path = str(tmp_path / "my cache/instructlab/models/gemma")
    separator = served["words"].index("--")
    assert served["words"][2:separator] == [
        *("--model-path", path, "--backend", "vllm", "--gpus", "1", "--chat-template", "tokenizer")
    ]
    assert served["words"][separator + 1 :] == [
        *("--dtype=bfloat16", "--max-model-len=8192", "--gpu-memory-utilization=0.9"),
        *("--served-model-name", path, "gemma"),
    ]


def test_a_tag_that_moved_is_not_served(
    artifact: ServedImage, registry: Registry, tmp_path: Path, tool: Callable[[str], str]
) -> None:
    tool("skopeo")
    moved = replace(artifact, reference=artifact.reference.partition("@")[0] + "@sha256:" + "1" * 64)
    finished = run(bundle_of(moved), tmp_path, registry.host)
    assert finished.returncode == 1
    assert finished.stderr == "raw names another artifact now: run gemma-pack deploy again\n"


def test_the_answer_is_asked_for_as_the_model_was_trained(served: Callable[..., ServedImage]) -> None:
    chat, base = (
        bundle_of(served(name, reference=f"quay.io/a/b@sha256:{'1' * 64}", is_artifact=True)).steps[-1]
        for name in ("gemma-2-9b-it", "gemma-3-270m")
    )
    assert chat == 'ilab model chat --model "${XDG_CACHE_HOME:-$HOME/.cache}/instructlab/models/b"'
    assert base.startswith("curl http://127.0.0.1:8000/v1/completions ")
    assert '"model": "b"' in base


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "this is a modelcar"),
        ({"is_artifact": True, "tag": None}, "downloads by tag"),
        ({"is_artifact": True}, "knows no registry with a port"),
    ],
)
def test_what_ilab_cannot_download_gemma_pack_pulls(
    served: Callable[..., ServedImage], tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    image = served(**changes)
    bundle = bundle_of(image)
    assert reason in bundle.files[0].text
    (tmp_path / "gemma-pack").write_text(PULLS, "utf-8")
    (tmp_path / "gemma-pack").chmod(0o755)
    for pulled in ([f"pulled {image.reference}"], []):  # nothing is pulled twice
        finished = run(bundle, tmp_path, "nowhere")
        assert finished.returncode == 0, finished.stderr
        *before, told = finished.stdout.splitlines()
        assert before == pulled
        assert json.loads(told)["files"] == ["config.json"]
    later = replace(image, reference=image.reference.partition("@")[0] + "@sha256:" + "1" * 64)
    assert run(bundle_of(later), tmp_path, "nowhere").stdout.startswith(f"pulled {later.reference}\n")


def test_options_of_other_targets_are_refused(served: Callable[..., ServedImage]) -> None:
    with pytest.raises(InvalidUsageError, match="--target rhelai has no use for --name"):
        bundle_of(served(), name="poet")
