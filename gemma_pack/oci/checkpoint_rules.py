"""What a checkpoint in an image must be like for a server to load it, whatever brought it there.

The rules of `Checkpoint.open`, on headers that lie in a registry: all that is wrong and not only the first thing.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.checkpoint import INDEX_NAME, SINGLE_NAME, TOKENIZER_FILES
from gemma_pack.errors import CheckpointError
from gemma_pack.gemma import require_bfloat16
from gemma_pack.oci.finding import Finding, absent, listed
from gemma_pack.oci.inspection import CHAT_TEMPLATES, TOKENIZER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gemma_pack.oci.inspection import Inspection
    from gemma_pack.safetensors_file import TensorInfo

CONFIG_NAME: Final = "config.json"
_PICKLED: Final = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})


def configuration(inspection: Inspection) -> Iterator[Finding]:
    """A server builds the model from config.json (transformers, AutoConfig; vLLM, the same)."""
    if CONFIG_NAME not in inspection.contents:
        yield Finding(severity=absent(inspection), message="there is no config.json")
    elif read_config(inspection) is None:
        yield Finding(severity="fails", message="config.json is no JSON object")


def tokenizer(inspection: Inspection) -> Iterator[Finding]:
    """A server needs tokenizer.json or tokenizer.model."""
    if not any(name in inspection.files for name in TOKENIZER_FILES):
        yield Finding(
            severity=absent(inspection),
            message=f"there is no tokenizer ({' or '.join(TOKENIZER_FILES)})",
            remedy="copy the tokenizer files of the model beside the weights",
        )


def chat_template(inspection: Inspection) -> Iterator[Finding]:
    """Without a template vLLM answers /v1/chat/completions with an error (vLLM docs, "Chat Template")."""
    told = _json(inspection, TOKENIZER_CONFIG) or {}
    if (
        inspection.is_read
        and not any(name in inspection.files for name in CHAT_TEMPLATES)
        and not told.get("chat_template")
    ):
        yield Finding(
            severity="warning",
            message="there is no chat template, and a server refuses /v1/chat/completions",
            remedy="add chat_template.jinja, if the model is tuned for chat",
        )


def safetensors_headers(inspection: Inspection) -> Iterator[Finding]:
    """A shard has the bytes that its header promises (safetensors, tensor.rs, `SafeTensors::deserialize`)."""
    for found in inspection.shards.values():
        if isinstance(found, CheckpointError):
            yield Finding(severity="fails", message=found.message, remedy="pack the checkpoint again")
    unread = [path for path in inspection.files if path.endswith(".safetensors") and path not in inspection.shards]
    if unread:
        yield Finding(severity="unknown", message=f"the header of {listed(unread)} was not reached")


def index(inspection: Inspection) -> Iterator[Finding]:
    """The index names each tensor once, in the shard that holds it; without one there is model.safetensors."""
    present = sorted(path for path in inspection.files if _is_shard(path))
    if INDEX_NAME not in inspection.files:
        if SINGLE_NAME not in present:
            message = f"there is no {INDEX_NAME} beside the shards" if present else f"there is no {SINGLE_NAME}"
            yield Finding(severity=absent(inspection), message=message)
        return
    weight_map = _weight_map(inspection)
    if weight_map is None:
        yield Finding(severity="fails", message=f"{INDEX_NAME} has no weight_map")
        return
    missing = sorted(set(weight_map.values()) - set(present))
    if missing:
        yield Finding(severity=absent(inspection), message=f"{INDEX_NAME} names {listed(missing)}, which is missing")
    if SINGLE_NAME in present and SINGLE_NAME not in weight_map.values():
        yield Finding(severity="fails", message=f"{SINGLE_NAME} lies beside an index of other shards")
        return
    held = {(tensor.name, path) for path, tensors in _headers(inspection).items() for tensor in tensors}
    read = set(_headers(inspection))
    promised = {(name, shard) for name, shard in weight_map.items() if shard in read}
    wrong = sorted(name for name, _ in held ^ promised)
    if wrong:
        yield Finding(severity="fails", message=f"{INDEX_NAME} and the shards differ about {listed(wrong)}")


def precision(inspection: Inspection) -> Iterator[Finding]:
    """Gemma's activations overflow float16 (vLLM, `_FLOAT16_NOT_SUPPORTED_MODELS`)."""
    config = read_config(inspection)
    if config is None or "gemma" not in str(config.get("model_type")):
        return
    try:
        require_bfloat16(config)
    except CheckpointError as error:
        yield Finding(severity="fails", message=error.message, remedy=error.hint)


def pickled_weights(inspection: Inspection) -> Iterator[Finding]:
    """Loading a pickle runs what it holds (Python, pickle, the warning at the top)."""
    pickles = sorted(path for path in inspection.files if PurePosixPath(path).suffix in _PICKLED)
    if pickles:
        yield Finding(
            severity="warning",
            message=f"{listed(pickles)} is a pickle: whoever loads it runs its code",
            remedy="leave it out: safetensors is enough",
        )


def read_config(inspection: Inspection) -> dict[str, Any] | None:
    """Return config.json; None where it is not there, or no object."""
    return _json(inspection, CONFIG_NAME)


def read_tensors(inspection: Inspection) -> dict[str, TensorInfo]:
    """Return every tensor of the shards at the top of the checkpoint whose headers are valid, by name."""
    return {tensor.name: tensor for tensors in _headers(inspection).values() for tensor in tensors}


def has_all_tensors(inspection: Inspection) -> bool:
    """Whether every shard of the checkpoint was reached, and read."""
    shards = {path for path in inspection.files if _is_shard(path)}
    named = set((_weight_map(inspection) or {}).values())
    return bool(shards) and shards | named == set(_headers(inspection))


def _headers(inspection: Inspection) -> Mapping[str, tuple[TensorInfo, ...]]:
    return {
        path: found
        for path, found in inspection.shards.items()
        if _is_shard(path) and not isinstance(found, CheckpointError)
    }


def _is_shard(path: str) -> bool:
    return path.endswith(".safetensors") and "/" not in path


def _weight_map(inspection: Inspection) -> dict[str, str] | None:
    weight_map = (_json(inspection, INDEX_NAME) or {}).get("weight_map")
    valid = isinstance(weight_map, dict) and weight_map and all(isinstance(one, str) for one in weight_map.values())
    return weight_map if valid else None


def _json(inspection: Inspection, name: str) -> dict[str, Any] | None:
    try:
        value = json.loads(inspection.contents.get(name, b""))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
