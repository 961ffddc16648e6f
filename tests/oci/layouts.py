"""OCI layouts read with nothing of ours."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def blob_path(layout: Path, digest: str) -> Path:
    """Return where a blob of the layout lies."""
    return layout / "blobs" / digest.replace(":", "/")


def read_document(layout: Path, digest: str) -> Any:
    """Return the JSON of a blob."""
    return json.loads(blob_path(layout, digest).read_text("utf-8"))


def manifest_for(layout: Path, architecture: str) -> Any:
    """Return the manifest of the layout's one image; of an index, the one for `architecture`."""
    (root,) = json.loads((layout / "index.json").read_text("utf-8"))["manifests"]
    document = read_document(layout, root["digest"])
    if "manifests" not in document:
        return document
    (found,) = [one for one in document["manifests"] if one["platform"]["architecture"] == architecture]
    return read_document(layout, found["digest"])
