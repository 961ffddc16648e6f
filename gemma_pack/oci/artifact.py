"""A checkpoint as an artifact of raw files: for clients that want files and not a file system.

One manifest, one blob a file, the blob being the file itself: its digest is the one that the hub and `sha256sum` give.
`oras pull` and RHEL AI's `ilab model download` go by the title of each layer, readers of CNCF ModelPack
by its media types and `org.cncf.model.filepath`. KServe wants a modelcar instead: it unpacks tar layers only.

Sources: https://github.com/modelpack/model-spec (spec.md, config.md, annotations.md);
instructlab src/instructlab/model/download.py, `_build_oci_model_file_map`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.oci.image import Image, created_time, describe_layers
from gemma_pack.oci.labels import image_annotations
from gemma_pack.oci.layers import MODELS_DIRECTORY, LayerEntry, group_entries
from gemma_pack.oci.manifest import MANIFEST_TYPE, Document, Manifest, describe, encode_json
from gemma_pack.record import read_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.oci.base import FileBlob
    from gemma_pack.record import Record

ARTIFACT_TYPE: Final = "application/vnd.cncf.model.manifest.v1+json"
ARTIFACT_CONFIG_TYPE: Final = "application/vnd.cncf.model.config.v1+json"

_MEDIA_TYPES: Final = {
    "tokenizer": "application/vnd.cncf.model.weight.config.v1.raw",
    "weights": "application/vnd.cncf.model.weight.v1.raw",
    "configuration": "application/vnd.cncf.model.weight.config.v1.raw",
    "documents": "application/vnd.cncf.model.doc.v1.raw",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RawFile:
    """One file of a checkpoint as a layer."""

    entry: LayerEntry
    media_type: str

    @property
    def title(self) -> str:
        """The file's path below the checkpoint's directory."""
        return self.entry.name.removeprefix(f"{MODELS_DIRECTORY}/")

    @property
    def files(self) -> tuple[LayerEntry, ...]:
        """The file."""
        return (self.entry,)

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.entry.size_bytes

    @property
    def annotations(self) -> dict[str, str]:
        """The path, for each kind of client under its own key, and the attributes that a tar header would have."""
        attributes = {
            "name": self.title.rsplit("/", 1)[-1],
            "mode": 0o644,
            "uid": 0,
            "gid": 0,
            "size": self.size_bytes,
            "mtime": "1970-01-01T00:00:00Z",
            "typeflag": ord("0"),
        }
        return {
            "org.opencontainers.image.title": self.title,
            "org.cncf.model.filepath": self.title,
            "org.cncf.model.file.metadata+json": encode_json(attributes).decode(),
            "org.cncf.model.file.mediatype.untested": "false",
        }

    def iter_chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the file's bytes from offset `start` on, in pieces of at most 1 MiB."""
        return self.entry.iter_chunks(start)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactPlan:
    """An artifact before its files are read."""

    layers: tuple[RawFile, ...]
    annotations: Mapping[str, str]
    model: Mapping[str, Any]
    """`descriptor` and `config` of the ModelPack configuration."""
    base_layers: tuple[FileBlob, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(layer.size_bytes for layer in self.layers)

    def assemble(self, digests: Sequence[str]) -> Image:
        """Return the artifact, given the digest of each of `layers` in order; its root is the one manifest."""
        layers = describe_layers(self.layers, digests)
        config = encode_json({**self.model, "modelfs": {"type": "layers", "diffIds": list(digests)}})
        described = describe(config, ARTIFACT_CONFIG_TYPE)
        manifest = Manifest(
            config=described, layers=layers, annotations=self.annotations, artifact_type=ARTIFACT_TYPE
        ).encode()
        root = describe(manifest, MANIFEST_TYPE, artifact_type=ARTIFACT_TYPE)
        documents = (Document(descriptor=described, data=config), Document(descriptor=root, data=manifest))
        return Image(root=root, documents=documents, layers=layers, base_layers=())


def plan_artifact(checkpoint: Checkpoint) -> ArtifactPlan:
    """Plan the artifact of a checkpoint.

    Raises:
        CheckpointError: the directory lacks a tokenizer, or holds what must not be shipped.
        InvalidUsageError: SOURCE_DATE_EPOCH is not a number.
    """
    checkpoint.require_tokenizer()
    texts = image_annotations(checkpoint, created_time())
    layers = tuple(
        RawFile(entry=entry, media_type=_MEDIA_TYPES[group])
        for group, entries in group_entries(checkpoint).items()
        for entry in entries
    )
    model = _describe_model(checkpoint, read_record(checkpoint.directory), texts)
    return ArtifactPlan(layers=layers, annotations=texts, model=model)


def _describe_model(checkpoint: Checkpoint, record: Record | None, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return what the ModelPack configuration says of a model; what is not known is left out."""
    config, quantization = checkpoint.config, record.quantization if record else None
    packing = config.get("quantization_config") or {}
    # A bf16 base has two bytes a parameter; what a quantized checkpoint packs into a tensor cannot be counted from it.
    if quantization:
        parameters = quantization.base_size_bytes // 2
    else:
        parameters = 0 if packing else sum(info.parameters for info in checkpoint.tensors.values())
    prefix = "org.opencontainers.image."
    descriptor = {
        "createdAt": texts[f"{prefix}created"],
        "family": config.get("model_type"),
        "name": texts[f"{prefix}title"],
        "title": texts[f"{prefix}title"],
        "description": texts[f"{prefix}description"],
        "sourceURL": texts.get(f"{prefix}url"),
        "revision": texts.get(f"{prefix}revision"),
        "licenses": [texts[f"{prefix}licenses"]] if f"{prefix}licenses" in texts else None,
    }
    technical = {
        "architecture": "transformer",
        "format": "safetensors",
        "paramSize": _count(parameters),
        "precision": config.get("dtype") or config.get("torch_dtype"),
        "quantization": quantization.algorithm if quantization else packing.get("quant_method"),
    }
    return {
        "descriptor": {key: value for key, value in descriptor.items() if value},
        "config": {key: value for key, value in technical.items() if value},
    }


def _count(parameters: int) -> str | None:
    """Return a number of parameters as ModelPack writes it, with one decimal at most: `268.1M`, `9.2B`."""
    for letter, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= scale:
            return f"{parameters / scale:.1f}".removesuffix(".0") + letter
    return None
