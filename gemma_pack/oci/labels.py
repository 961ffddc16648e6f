"""What an image says of itself, all of it read from the record and the config, nothing typed.

OCI's annotations for every tool, the labels that Red Hat's builders set for the OpenShift console, and our own
for `inspect` and `deploy`. The same texts are the image's labels and the annotations of manifest and index.

Sources: OCI image-spec annotations.md; https://docs.openshift.com/container-platform/latest/openshift_images/
create-images.html ("Defining image metadata"); modelcar-maker for `model.name` and `model.commit`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from gemma_pack.checkpoint import RECORD_NAME, file_sha256
from gemma_pack.record import read_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.record import Record

_SPDX: Final = {"apache-2.0": "Apache-2.0", "mit": "MIT"}
"""The hub's names of licences that SPDX knows; the Gemma terms are not among them."""
HUB_PAGE: Final = "https://huggingface.co/"


def image_annotations(checkpoint: Checkpoint, created: str) -> dict[str, str]:
    """Return the annotations of the image of `checkpoint`.

    Args:
        checkpoint: with or without a record; without one, only what its config says is said.
        created: RFC 3339 time.

    Raises:
        CheckpointError: the record is broken.
    """
    record = read_record(checkpoint.directory)
    texts = _from_record(record) if record else _from_config(checkpoint.config)
    texts["org.opencontainers.image.created"] = created
    if record:
        texts["gemma-pack.record.sha256"] = file_sha256(checkpoint.directory / RECORD_NAME)
    return dict(sorted(texts.items()))


def image_labels(texts: Mapping[str, str]) -> dict[str, str]:
    """Return the labels of the image's config: the annotations, and the same under Red Hat's names."""
    title = texts["org.opencontainers.image.title"]
    description = texts["org.opencontainers.image.description"]
    red_hat = {
        "name": title,
        "summary": title,
        "description": description,
        "io.k8s.display-name": title,
        "io.k8s.description": description,
        "io.openshift.tags": "model,gemma,modelcar",
    }
    for ours, theirs in (
        ("org.opencontainers.image.url", "url"),
        ("org.opencontainers.image.revision", "model.commit"),
        ("gemma-pack.model", "model.name"),
    ):
        if ours in texts:
            red_hat[theirs] = texts[ours]
    return dict(sorted({**texts, **red_hat}.items()))


def variant_title(record: Record) -> str:
    """Return what a variant is called wherever it lies: the base's short name and the recipe."""
    short = record.source.model_id.rsplit("/", 1)[-1].lower()
    return f"{short}-quantized.{record.quantization.recipe}" if record.quantization else short


def _from_record(record: Record) -> dict[str, str]:
    source, quantization, validation = record.source, record.quantization, record.validation
    sentences = [source.model_id + (f" at {source.revision}" if source.revision else "")]
    texts = {
        "org.opencontainers.image.title": variant_title(record),
        "org.opencontainers.image.licenses": _SPDX.get(source.license, f"LicenseRef-{source.license}"),
        "gemma-pack.model": source.model_id,
    }
    if source.revision:
        texts["org.opencontainers.image.revision"] = source.revision
    if source.kind == "hub":
        texts["org.opencontainers.image.url"] = HUB_PAGE + source.model_id
    if quantization:
        sentences[0] += f", quantized by recipe {quantization.recipe}: {quantization.scheme}"
        texts["gemma-pack.recipe"] = quantization.recipe
        texts["gemma-pack.recipe.sha256"] = quantization.recipe_sha256
        texts["gemma-pack.scheme"] = quantization.scheme
    if validation:
        sentences.append(f"Validation against its base: {validation.verdict}")
        texts["gemma-pack.verdict"] = validation.verdict
        texts["gemma-pack.report.sha256"] = validation.report_sha256
    if source.note:
        sentences.append(source.note.rstrip("."))
    texts["org.opencontainers.image.description"] = ". ".join(sentences) + "."
    return texts


def _from_config(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a checkpoint without a record says of itself: a kind of model, not which one."""
    kind = str(config.get("model_type", "model"))
    architecture = ", ".join(map(str, config.get("architectures") or ())) or "an unnamed architecture"
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    form = f"quantized ({method})" if method else str(config.get("dtype") or config.get("torch_dtype") or "unquantized")
    return {
        "org.opencontainers.image.title": kind,
        "org.opencontainers.image.description": f"A checkpoint of {architecture}, {form}; its origin is not recorded.",
    }
