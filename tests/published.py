"""Schemas that others publish and this project does not contain: of Kubernetes objects and OCI documents."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def published(name: str) -> Path:
    """Return the file in $GEMMA_PACK_SCHEMAS, or in shared/schemas in or beside the checkout.

    Where there is no such folder the test is skipped; a folder that lacks the file is a mistake, and fails it.
    """
    root = Path(__file__).parents[1]
    given = os.environ.get("GEMMA_PACK_SCHEMAS")
    places = [Path(given)] if given else [root / "shared/schemas", root.parent / "shared/schemas"]
    folder = next(filter(Path.is_dir, places), None)
    if folder is None and given:
        pytest.fail(f"GEMMA_PACK_SCHEMAS names {given}, and it is no folder")
    if folder is None:
        pytest.skip(f"the published {name} is not here: GEMMA_PACK_SCHEMAS names a folder that has it")
    if not (folder / name).is_file():
        pytest.fail(f"{folder} has no {name}")
    return folder / name
