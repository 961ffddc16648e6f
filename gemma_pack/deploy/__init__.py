"""What each server needs to serve an image, written from its record: one target a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gemma_pack.deploy.kserve import kserve_bundle
from gemma_pack.deploy.rhaiis import rhaiis_bundle
from gemma_pack.deploy.rhelai import rhelai_bundle
from gemma_pack.deploy.vllm import vllm_bundle
from gemma_pack.disk import staged_directory

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.deploy.bundle import Bundle

MAKERS: Final = {"vllm": vllm_bundle, "rhaiis": rhaiis_bundle, "rhelai": rhelai_bundle, "kserve": kserve_bundle}
"""By target: what makes its bundle of an image, its resources and the user's options."""


def write_bundle(bundle: Bundle, directory: Path) -> None:
    """Write the files of a bundle into `directory`, which appears whole or not at all.

    Raises:
        InvalidUsageError: `directory` is in the way.
    """
    with staged_directory(directory) as staging:
        for file in bundle.files:
            (staging / file.name).write_text(file.text, "utf-8")
