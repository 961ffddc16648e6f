"""Six variants of the demo model in one repository: what they share is stored once and sent once."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.oci.registry import running_registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.real.conftest import Built

pytestmark = pytest.mark.real

WITHOUT_DATA = ("w8a16", "fp8-dynamic", "fp8-block", "bnb-int8", "bnb-nf4")
EMBEDDING_BYTES = 262_144 * 640 * 2


def test_six_variants_take_at_most_three_fifths_of_their_sum(
    demo_build: Built, demo_checkpoint: Path, tool: Callable[[str], str], tmp_path: Path
) -> None:
    program = tool("docker-registry")
    recipes = [argument for name in WITHOUT_DATA for argument in ("--recipe", name)]
    made = demo_build.gemma_pack("quantize", str(demo_checkpoint), *recipes, "--offline", "--format", "json")
    directories = dict(
        zip(WITHOUT_DATA, (one["directory"] for one in json.loads(made.stdout)["variants"]), strict=True)
    )
    directories["w4a16"] = str(demo_build.directory)
    store = tmp_path / "registry"
    store.mkdir()
    pushed: list[dict[str, Any]] = []
    with running_registry(program, store) as registry:
        for name, directory in directories.items():
            reference = f"{registry.host}/gemma-3-270m:{name}"
            done = demo_build.gemma_pack("push", directory, reference, "--no-referrers", "--format", "json")
            pushed.append(json.loads(done.stdout))
            if name in WITHOUT_DATA:
                shutil.rmtree(demo_build.work / directory)
    total = sum(one["size_bytes"] for one in pushed)
    stored = sum(path.stat().st_size for path in store.rglob("data"))
    assert stored == pytest.approx(sum(one["uploaded_bytes"] for one in pushed), rel=0.001)
    assert stored <= 0.6 * total
    first, *others = pushed
    assert first["shared_with"] is None
    assert all(one["shared_with"] and one["shared_bytes"] > EMBEDDING_BYTES for one in others)
