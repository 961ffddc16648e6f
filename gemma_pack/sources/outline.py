"""A model by its headers: config and every tensor's name, dtype and shape, without its weights.

From a hub come the list of files, config.json and the first kilobytes of each safetensors file; from a directory, or
what this machine has of a hub model, the same from disk. The demo model is not assembled for it: its shapes follow
from its config.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gemma_pack import __version__
from gemma_pack.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from gemma_pack.errors import CheckpointError, InvalidUsageError, OfflineError, SourceError
from gemma_pack.gemma import decoder_linears, decoder_number, require_supported
from gemma_pack.safetensors_file import LENGTH_BYTES, TensorInfo, header_bytes, parse_header
from gemma_pack.sources import DEMO, is_hub_id, refuse_file
from gemma_pack.sources.kept import cache_directory, called, find_kept

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma_pack.sources.hub import Snapshot
    from gemma_pack.sources.transfer import RemoteFile

FIRST_BYTES: Final = 256 << 10
"""Asked for at once of a safetensors file: more than the header of a shard of any Gemma takes."""
MAX_SMALL_BYTES: Final = 64 << 20
"""Of a file that is held in memory: config and index have kilobytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What is known of a model before its weights are there.

    Attributes:
        model_id: hub id, or the name of a directory.
        revision: the hub's commit; None where there is none.
        checkpoint: config and tensors; their files may be elsewhere.
        companions: sizes in bytes of the small files beside the weights, by name.
        digests: sha256 of the safetensors files, by name, as far as they are known without reading them.
        fetch_bytes: what quantize would fetch first; 0 where all is on this machine.
    """

    model_id: str
    revision: str | None
    checkpoint: Checkpoint
    companions: Mapping[str, int]
    digests: Mapping[str, str]
    fetch_bytes: int


def outline(model: str, *, revision: str | None = None, offline: bool = False) -> Outline:
    """Return the outline of `model`: `demo`, a directory, or a hub id.

    Raises:
        InvalidUsageError: `model` is none of the three.
        CheckpointError: not a supported Gemma in bf16, or headers that disagree.
        SourceError, AccessError, OfflineError: see the hub.
    """
    refuse_file(model)
    if model == DEMO:
        found = _demo()
    elif Path(model).is_dir():
        name, commit = called(Path(model))
        found = _on_disk(Path(model), name, revision=commit)
    elif is_hub_id(model):
        found = _on_hub(model, revision, offline=offline)
    else:
        raise InvalidUsageError(
            f"{model or repr(model)} is neither demo, nor an existing directory, nor a hub id",
            hint="a hub id looks like google/gemma-2-9b-it",
        )
    require_supported(found.checkpoint.config)
    from gemma_pack.sources.directory import require_bf16_tensors

    require_bf16_tensors(found.checkpoint)
    return found


def _on_disk(directory: Path, model_id: str, *, revision: str | None) -> Outline:
    from gemma_pack.sources.kept import recorded_source

    checkpoint = Checkpoint.open(directory)
    recorded = recorded_source(directory)
    files = recorded.files if recorded else ()
    return Outline(
        model_id=recorded.model_id if recorded else model_id,
        revision=recorded.revision if recorded else revision,
        checkpoint=checkpoint,
        companions={path.name: path.stat().st_size for path in checkpoint.companions()},
        digests={file.path: file.sha256 for file in files if file.path.endswith(".safetensors")},
        fetch_bytes=0,
    )


def _demo() -> Outline:
    """Return the demo model as it lies in the cache, or as its config says it will be."""
    from gemma_pack.sources.demo import CONFIG, MODEL_ID

    name = MODEL_ID.rpartition("/")[2]
    if kept := find_kept(cache_directory() / "demo" / __version__ / name, "demo", MODEL_ID):
        return _on_disk(kept.directory, MODEL_ID, revision=None)
    tensors, position = {}, 0
    for tensor, shape in gemma3_shapes(CONFIG).items():
        size = 2
        for length in shape:
            size *= length
        tensors[tensor] = TensorInfo(
            name=tensor, dtype="BF16", shape=shape, file=Path(SINGLE_NAME), begin=position, end=position + size
        )
        position += size
    checkpoint = Checkpoint(directory=Path(name), config=CONFIG, tensors=tensors)
    return Outline(
        model_id=MODEL_ID, revision=None, checkpoint=checkpoint, companions={}, digests={}, fetch_bytes=position
    )


def gemma3_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Gemma 3 text model (transformers, `Gemma3Model`)."""
    hidden, inner = decoder_number(config, "hidden_size"), decoder_number(config, "intermediate_size")
    dim = decoder_number(config, "head_dim")
    queries = decoder_number(config, "num_attention_heads") * dim
    keys = decoder_number(config, "num_key_value_heads") * dim
    linears = {
        "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (int(config["vocab_size"]), hidden)}
    for number, groups in enumerate(decoder_linears(config, "model.")):
        shapes |= {f"{name}.weight": linears[name.rpartition(".")[2]] for group in groups for name in group}
        shapes |= {f"model.layers.{number}.{norm}_layernorm.weight": (hidden,) for norm in norms}
        shapes |= {f"model.layers.{number}.self_attn.{part}_norm.weight": (dim,) for part in "qk"}
    return {**shapes, "model.norm.weight": (hidden,)}


def _on_hub(model_id: str, revision: str | None, *, offline: bool) -> Outline:
    from gemma_pack.sources import hub
    from gemma_pack.sources.pinned import find_pinned

    if offline or hub.is_offline():
        if kept := find_pinned(model_id, revision):
            return _on_disk(kept.directory, model_id, revision=kept.record.revision)
        if (snapshot := hub.find_cached(model_id, revision)) is None:
            raise OfflineError(
                f"{model_id} is not on this machine, and the network is switched off",
                hint="run the same command without --offline and HF_HUB_OFFLINE",
            )
        return _of_snapshot(snapshot)
    snapshot = hub.look_up(model_id, revision)
    if kept := find_pinned(model_id, snapshot.commit):
        return _on_disk(kept.directory, model_id, revision=snapshot.commit)
    return _of_snapshot(snapshot)


def _of_snapshot(snapshot: Snapshot) -> Outline:
    """Read config, index and headers of a snapshot, from the library's cache or by requests for their first bytes."""
    from gemma_pack.sources.hub import require_files, translated_errors

    files = {file.path: file for file in snapshot.files}
    described = snapshot.require_config()
    with translated_errors(snapshot.model_id, snapshot.commit):
        config = json.loads(_whole(described))
        weight_map: Any = {"": SINGLE_NAME}
        if INDEX_NAME in files:
            weight_map = _object(json.loads(_whole(files[INDEX_NAME]))).get("weight_map")
        if not isinstance(weight_map, dict):
            raise SourceError(f"{INDEX_NAME} of {snapshot.model_id} has no weight_map", hint="use another revision")
        names = set(map(str, weight_map.values()))
        require_files(snapshot, sorted(names))
        tensors = {info.name: info for name in sorted(names) for info in _header(files[name])}
    wanted = [file for file in snapshot.files if file.path in names or not file.path.endswith(".safetensors")]
    return Outline(
        model_id=snapshot.model_id,
        revision=snapshot.commit,
        checkpoint=Checkpoint(
            directory=Path(snapshot.model_id.rpartition("/")[2]), config=_object(config), tensors=tensors
        ),
        companions={file.path: file.size_bytes for file in wanted if file.path not in names},
        digests={name: files[name].digest for name in names if files[name].algorithm == "sha256"},
        fetch_bytes=sum(file.size_bytes for file in wanted if file.cached is None),
    )


def _object(parsed: Any) -> dict[str, Any]:  # noqa: ANN401 - parsed JSON
    if not isinstance(parsed, dict):
        raise CheckpointError("config.json or the index holds no JSON object", hint="use another revision of the model")
    return parsed


def _header(file: RemoteFile) -> list[TensorInfo]:
    head = _first(file, FIRST_BYTES)
    needed = header_bytes(head, file.size_bytes) if len(head) >= LENGTH_BYTES else LENGTH_BYTES
    if needed > len(head):
        head = _first(file, needed)
    return parse_header(Path(file.path), head[:needed], file.size_bytes)


def _whole(file: RemoteFile) -> bytes:
    """Return a small file's bytes, checked against the hub's digest."""
    if file.size_bytes > MAX_SMALL_BYTES:
        raise SourceError(f"{file.path} has {file.size_bytes} bytes, which is too large", hint="check the model's page")
    data = _first(file, file.size_bytes)
    state = (
        hashlib.sha256()
        if file.algorithm == "sha256"
        else hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
    )
    state.update(data)
    if state.hexdigest() != file.digest:
        raise SourceError(
            f"{file.path} does not match the {file.algorithm} that the hub names",
            hint="run the same command again; if it happens again, a proxy or the disk alters the bytes",
        )
    return data


def _first(file: RemoteFile, size_bytes: int) -> bytes:
    """Return the first bytes of a file of the hub, at most `size_bytes`."""
    size_bytes = min(size_bytes, file.size_bytes)
    if file.cached is not None:
        with file.cached.open("rb") as stream:
            return stream.read(size_bytes)
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    headers = build_hf_headers(library_name="gemma-pack", library_version=__version__)
    headers |= {"Accept-Encoding": "identity", "Range": f"bytes=0-{size_bytes - 1}"}
    data = bytearray()
    with get_session().stream("GET", file.url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes():  # a server without ranges sends the whole file: the rest is not read
            data += piece
            if len(data) >= size_bytes:
                break
    return bytes(data[:size_bytes])
