"""What a report says of variant, base and engine."""

from __future__ import annotations

import hashlib
import importlib.metadata
from typing import TYPE_CHECKING

from gemma_pack.digests import digest_files
from gemma_pack.errors import CheckpointError
from gemma_pack.report import Base, Engine, Subject

if TYPE_CHECKING:
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.engines.in_process import Model
    from gemma_pack.record import QuantizationRecord, Record, SourceRecord


def quantization_of(record: Record, checkpoint: Checkpoint) -> QuantizationRecord:
    """Return what the record says of the quantization; raise CheckpointError where it says nothing."""
    if record.quantization is None:
        raise CheckpointError(f"{checkpoint.directory} is no variant: its record has no quantization")
    return record.quantization


def describe_variant(record: Record, checkpoint: Checkpoint, reporter: Reporter) -> Subject:
    """Return the variant's recipe, size and files, whose digests are computed here."""
    quantization = quantization_of(record, checkpoint)
    return Subject(
        recipe=quantization.recipe,
        recipe_sha256=quantization.recipe_sha256,
        scheme=quantization.scheme,
        size_bytes=checkpoint.size_bytes,
        files=digest_files(checkpoint.shards, "Hashing the variant", reporter),
    )


def describe_base(source: SourceRecord, checkpoint: Checkpoint) -> Base:
    """Return where the base is from, how large it is, and which weights it has."""
    lines = [f"{file.sha256} {file.path}\n" for file in source.files if file.path.endswith(".safetensors")]
    return Base(
        kind=source.kind,
        model_id=source.model_id,
        revision=source.revision,
        note=source.note,
        parameters=sum(tensor.parameters for tensor in checkpoint.tensors.values()),
        size_bytes=checkpoint.size_bytes,
        weights_sha256=hashlib.sha256("".join(sorted(lines)).encode()).hexdigest() if lines else None,
    )


def describe_engine(model: Model) -> Engine:
    """Return what computes a model that is loaded in this process."""
    import torch

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    libraries = ("torch", "transformers", "compressed-tensors", "tokenizers")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return Engine(name="transformers", versions=versions, device=device, attention=model.attention)
