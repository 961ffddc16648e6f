"""What an artifact of raw files must be like: the rules of ilab and of the readers of CNCF ModelPack."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gemma_pack.oci.artifact import ARTIFACT_CONFIG_TYPE
from gemma_pack.oci.extraction import is_raw
from gemma_pack.oci.finding import Finding, listed
from gemma_pack.oci.raw_files import FILEPATH

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma_pack.oci.inspection import Inspection


def titled_files(inspection: Inspection) -> Iterator[Finding]:
    """Ilab links each layer's blob to the file that its title names: no tars, no directories, one title a blob.

    Source: instructlab src/instructlab/model/download.py, `_build_oci_model_file_map` and `download`.
    """
    layers = inspection.manifest.layers
    untitled = [layer for layer in layers if not layer.title]
    tars = [layer for layer in layers if not is_raw(layer.media_type)]
    titles: dict[str, list[str]] = {}
    for layer in layers:
        titles.setdefault(layer.digest, []).append(layer.title or "")
    twins = [title for found in titles.values() for title in found[:-1]]
    nested = [str(layer.title) for layer in layers if "/" in (layer.title or "")]
    if untitled:
        message = f"no title on {len(untitled)} of {len(layers)} layers, and ilab wants one on each"
    elif tars:
        message = f"ilab would take {tars[0].title} as it is, and it is {tars[0].media_type.rpartition('.')[2]}"
    elif nested:
        message = f"{listed(nested)} lies in a directory, which ilab does not make"
    elif twins:
        message = f"{listed(twins)} has the same bytes as another file, and ilab writes only the last of them"
    else:
        return
    remedy = "gemma-pack package --layout artifact" if untitled or tars else None
    yield Finding(severity="fails", consumers=("ilab",), message=message, remedy=remedy)


def model_pack(inspection: Inspection) -> Iterator[Finding]:
    """Readers of ModelPack go by its media types and by the path that each layer has.

    Sources: model-spec spec.md, config.md and annotations.md; modctl pkg/codec/codec.go and pkg/backend/extract.go.
    """
    kind = inspection.manifest.config.media_type
    wrong = [
        one
        for one in inspection.manifest.layers
        if not re.search(r"^application/vnd\.cncf\.model\..*(raw|tar)$", one.media_type)
    ]
    pathless = [
        one for one in inspection.manifest.layers if is_raw(one.media_type) and not one.annotations.get(FILEPATH)
    ]
    parts = [
        name for name in ("descriptor", "config", "modelfs") if not isinstance(inspection.configuration.get(name), dict)
    ]
    remedy = None
    if kind != ARTIFACT_CONFIG_TYPE:
        message = f"its configuration is {kind}, not {ARTIFACT_CONFIG_TYPE}"
        remedy = "gemma-pack package --layout artifact"
    elif wrong:
        message = f"a layer is {wrong[0].media_type}, which is none of ModelPack's types"
    elif pathless:
        message = f"layer {pathless[0].digest[:19]} has no {FILEPATH}, so it has no place"
    elif parts:
        message = f"its configuration has no {' and no '.join(parts)}"
    else:
        return
    yield Finding(severity="fails", consumers=("modelpack",), message=message, remedy=remedy)
