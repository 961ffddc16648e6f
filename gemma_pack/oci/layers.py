"""A checkpoint as the layers of an image, without a copy of it.

A layer is planned, not built: its size follows from the sizes of its files, and its bytes (tar header, file, padding)
are made while they are read. So a layout is written with one read of each file, and a push needs no layout at all.

The same files always give the same bytes: sorted names, mtime 0, owner 0:0, no names, modes 0644 and 0755. The time
stays 0 even under SOURCE_DATE_EPOCH, which CI sets to the time of a commit: a shard that did not change must stay
the same blob. Uncompressed, because weights do not compress, so a layer's digest is its diff_id too.
Names go without `./`, as KServe's fetch reader wants them.

Sources: OCI image-spec layer.md; kserve_storage.py, `_download_oci`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, Protocol

from gemma_pack.checkpoint import PICKLED_SUFFIXES
from gemma_pack.errors import CheckpointError
from gemma_pack.oci.manifest import LAYER_TYPE
from gemma_pack.oci.tar_header import DIRECTORY, END, REGULAR, member_header, padded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from gemma_pack.checkpoint import Checkpoint

MODELS_DIRECTORY: Final = "models"
"""Where every consumer looks for the checkpoint inside the image."""
MAX_WEIGHT_LAYERS: Final = 32
"""With those of a base and three of small files, an image stays under the 40 layers that every runtime mounts."""
CHUNK_BYTES: Final = 1 << 20

_TOKENIZER: Final = frozenset({
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "video_preprocessor_config.json", "vocab.json",
})  # fmt: skip
_DOCUMENT_SUFFIXES: Final = frozenset({".html", ".jpg", ".md", ".pdf", ".png", ".svg", ".txt", ".xml"})
_DOCUMENT_STEMS: Final = ("license", "notice", "report", "usage_policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEntry:
    """One member of a layer's tar: a file, or a directory when `source` is None (its name ends with a slash)."""

    name: str
    source: Path | None = None
    size_bytes: int = 0

    def header(self) -> bytes:
        """Return the GNU header blocks that precede the member's bytes."""
        if self.source is None:
            return member_header(self.name, 0, 0o755, DIRECTORY)
        return member_header(self.name, self.size_bytes, 0o644, REGULAR)

    def iter_chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the file's bytes from offset `start` on, in pieces of at most 1 MiB; a directory has none.

        Raises:
            CheckpointError: the file is gone, or has another size than when it was planned.
        """
        return read_file(self.source, self.size_bytes, start) if self.source else iter(())


class Layer(Protocol):
    """What a plan knows of a layer before it is read: a tar that is made on the way, or a file as it is."""

    @property
    def media_type(self) -> str:
        """Its media type in a manifest."""

    @property
    def annotations(self) -> Mapping[str, str]:
        """Its annotations in a manifest."""

    @property
    def title(self) -> str:
        """What to call it in progress and results."""

    @property
    def files(self) -> tuple[LayerEntry, ...]:
        """The files of the checkpoint in it."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole layer."""

    def iter_chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield its bytes from offset `start` on, in pieces of at most 1 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSource:
    """A layer that is made while it is read."""

    entries: tuple[LayerEntry, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    media_type: str = LAYER_TYPE

    @property
    def title(self) -> str:
        """What to call the layer in progress and results."""
        return self.annotations["org.opencontainers.image.title"]

    @property
    def files(self) -> tuple[LayerEntry, ...]:
        """The members that are files."""
        return tuple(entry for entry in self.entries if entry.source)

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tar, known without reading any file."""
        return sum(len(entry.header()) + padded(entry.size_bytes) for entry in self.entries) + len(END)

    def iter_chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the tar's bytes from offset `start` on, in pieces of at most 1 MiB.

        Raises:
            CheckpointError: a file is gone, or has another size than when the layer was planned.
        """
        position = 0
        for part in self.parts():
            size = len(part) if isinstance(part, bytes) else part.size_bytes
            skip = max(0, start - position)
            position += size
            if skip >= size:
                continue
            if isinstance(part, bytes):
                yield part[skip:]
            else:
                yield from part.iter_chunks(skip)

    def parts(self) -> Iterator[bytes | LayerEntry]:
        """Yield the tar in order: headers, padding and end mark as bytes, and the files for their content."""
        for entry in self.entries:
            yield entry.header()
            if entry.source:
                yield entry
                yield bytes(padded(entry.size_bytes) - entry.size_bytes)
        yield END


def plan_layers(checkpoint: Checkpoint) -> tuple[LayerSource, ...]:
    """Return the layers of a checkpoint: tokenizer, weights (one a shard), configuration and record, documents.

    What changes least comes first. Sub-directories are kept; hidden files are left out.

    Raises:
        CheckpointError: the directory holds something that must not go into an image: a link that leaves it, a
            pickle, a special file, a shard that the index does not name.
    """
    return arrange_layers(_collect(checkpoint))


def arrange_layers(entries: Iterable[LayerEntry]) -> tuple[LayerSource, ...]:
    """Return the layers that files are packed in; nothing is read, so the files need not be there yet."""
    groups = _grouped(entries)
    layers = [
        _layer(groups["tokenizer"], "tokenizer.tar"),
        *_weight_layers(groups["weights"]),
        _layer(groups["configuration"], "configuration.tar"),
    ]
    if groups["documents"]:
        layers.append(_layer(groups["documents"], "documents.tar"))
    return tuple(layers)


def group_entries(checkpoint: Checkpoint) -> dict[str, list[LayerEntry]]:
    """Return the files of a checkpoint by what they are: tokenizer, weights, configuration, documents.

    Raises:
        CheckpointError: as `plan_layers`.
    """
    return _grouped(_collect(checkpoint))


def _grouped(entries: Iterable[LayerEntry]) -> dict[str, list[LayerEntry]]:
    groups: dict[str, list[LayerEntry]] = {"tokenizer": [], "weights": [], "configuration": [], "documents": []}
    for entry in entries:
        groups[_group(entry)].append(entry)
    return groups


def _collect(checkpoint: Checkpoint) -> list[LayerEntry]:
    """Return the files to pack, sorted by name."""
    root = checkpoint.directory.resolve()
    entries: list[LayerEntry] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        entries += [_entry(Path(folder) / name, root) for name in (*names, *links) if not name.startswith(".")]
    shards = {path.resolve() for path in checkpoint.shards}
    for entry in entries:
        if _is_stray(entry, shards):
            raise CheckpointError(
                f"{entry.source} is not a part of the checkpoint, and servers may load it all the same",
                hint="move it out of the directory",
            )
    return sorted(entries, key=lambda entry: entry.name)


def _entry(path: Path, root: Path) -> LayerEntry:
    relative = path.relative_to(root).as_posix()
    try:
        relative.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the file name {relative!r} is not UTF-8", hint="rename the file") from error
    source = Path(os.path.realpath(path))  # unlike resolve(), at ease with a link to itself
    if not source.is_relative_to(root):
        raise CheckpointError(
            f"{path} is a link that leaves the directory", hint="copy the directory with cp -rL, which follows links"
        )
    if not source.is_file():
        raise CheckpointError(f"{path} is neither a file nor a directory", hint="remove it, or replace it by a copy")
    if path.suffix in PICKLED_SUFFIXES:
        raise CheckpointError(
            f"{path} looks like a pickle, which runs code when it is loaded", hint="move it out of the directory"
        )
    return LayerEntry(name=f"{MODELS_DIRECTORY}/{relative}", source=source, size_bytes=source.stat().st_size)


def _is_stray(entry: LayerEntry, shards: set[Path]) -> bool:
    path = PurePosixPath(entry.name)
    return path.suffix == ".safetensors" and len(path.parts) == 2 and entry.source not in shards


def _group(entry: LayerEntry) -> str:
    path = PurePosixPath(entry.name)
    if path.suffix == ".safetensors":
        return "weights"
    if path.name in _TOKENIZER:
        return "tokenizer"
    if path.suffix in _DOCUMENT_SUFFIXES or path.name.lower().startswith(_DOCUMENT_STEMS):
        return "documents"
    return "configuration"


def _weight_layers(entries: Sequence[LayerEntry]) -> list[LayerSource]:
    """Return a layer a shard; of more shards than MAX_WEIGHT_LAYERS, neighbours share one."""
    per_layer = -(-len(entries) // MAX_WEIGHT_LAYERS)
    parts = [entries[first : first + per_layer] for first in range(0, len(entries), per_layer)]
    if per_layer == 1:
        return [_layer(part, part[0].name.removeprefix(f"{MODELS_DIRECTORY}/") + ".tar") for part in parts]
    return [_layer(part, f"weights-{number:05d}-of-{len(parts):05d}.tar") for number, part in enumerate(parts, 1)]


def _layer(entries: Sequence[LayerEntry], title: str) -> LayerSource:
    """Return the layer of these files, with an entry for each directory above them.

    The title ends in .tar because that is what a client that goes by titles alone (`oras pull`) would write under it.
    `olot.layer.content.*` are the keys by which olot and the pipelines built on it find the one file of a layer.
    """
    annotations = {"org.opencontainers.image.title": title}
    if len(entries) == 1:
        annotations |= {
            "olot.layer.content.type": "file",
            "olot.layer.content.inlayerpath": f"/{entries[0].name}",
            "olot.layer.content.name": PurePosixPath(entries[0].name).name,
        }
    return LayerSource(entries=(*_directories(entries), *entries), annotations=annotations)


def _directories(entries: Iterable[LayerEntry]) -> list[LayerEntry]:
    folders = {parent for entry in entries for parent in PurePosixPath(entry.name).parents if parent.name}
    return [LayerEntry(name=f"{folder}/") for folder in sorted(folders)]


def read_file(path: Path, size_bytes: int, start: int = 0) -> Iterator[bytes]:
    """Yield the bytes of a file from offset `start` on, in pieces of at most 1 MiB.

    Raises:
        CheckpointError: the file is gone, or its size is not the one that was planned with.
    """
    changed = CheckpointError(
        f"{path} changed while it was packed", hint="run the command again when nothing writes to the directory"
    )
    left = size_bytes - start
    try:
        with path.open("rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_size != size_bytes:
                raise changed
            stream.seek(start)
            while left:
                chunk = stream.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise changed
                left -= len(chunk)
                yield chunk
    except FileNotFoundError as error:
        raise changed from error
