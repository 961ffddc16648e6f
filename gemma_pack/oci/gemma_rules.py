"""What the tensors of a Gemma must be like: shapes by config.json, dtypes by its quantization_config.

A server fails on what differs, or loads it and answers nonsense. All of it is in the headers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.errors import CheckpointError
from gemma_pack.gemma import (
    decoder_linears,
    decoder_number,
    decoder_prefix,
    is_embedding_or_head,
    linear_shape,
    require_gemma,
    text_config,
)
from gemma_pack.oci.checkpoint_rules import has_all_tensors, read_config, read_tensors
from gemma_pack.oci.finding import Finding, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gemma_pack.oci.inspection import Inspection
    from gemma_pack.safetensors_file import TensorInfo

_PLAIN: Final = frozenset({"BF16", "F32", "F16"})
_SCALES: Final = ("BF16", "F32", "F16")
_STORED: Final = {
    "pack-quantized": {"weight_packed": ("I32",), "weight_scale": _SCALES, "weight_shape": ("I64", "I32")},
    "int-quantized": {"weight": ("I8",), "weight_scale": _SCALES},
    "float-quantized": {"weight": ("F8_E4M3",), "weight_scale": _SCALES},
    "nvfp4-pack-quantized": {
        "weight_packed": ("U8",), "weight_scale": ("F8_E4M3",), "weight_global_scale": ("F32", "BF16"),
    },
}  # fmt: skip
"""What stands for a linear layer on disk, and its dtypes (compressed-tensors, `compressors/`, by format)."""
_MAX_REPEATS: Final = 3
_MAX_PATTERNS: Final = 50
"""Of `ignore`, each with so many repetitions and none within another: whoever wrote the image must not keep us busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """One linear layer of the decoder: the shape that config.json gives it, and the tensors that are there."""

    name: str
    rows: int
    columns: int
    tensors: Mapping[str, TensorInfo]
    """By what follows the layer's name, such as `weight_scale`."""

    @property
    def is_plain(self) -> bool:
        """Whether its weight is stored as it is."""
        return "weight" in self.tensors and self.tensors["weight"].dtype in _PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gemma:
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    prefix: str
    groups: list[list[_Linear]]
    """The linear layers that a server fuses into one matrix, each group."""

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else None


def known_family(inspection: Inspection) -> Iterator[Finding]:
    """Only of a Gemma whose layers are known can shapes and dtypes be compared."""
    config = read_config(inspection)
    if config is None:
        return
    try:
        require_gemma(config)
    except CheckpointError as error:
        yield Finding(severity="warning", message=f"{error.message}; its tensors were not compared with its config")
        return
    if has_all_tensors(inspection):
        try:
            _gemma(inspection)
        except CheckpointError as error:
            yield Finding(severity="fails", message=error.message)


def shapes(inspection: Inspection) -> Iterator[Finding]:
    """Every layer that config.json promises is there, in the shape that it gives (transformers, `Gemma3TextModel`)."""
    gemma = _found(inspection)
    if gemma is None:
        return
    missing = [linear.name for group in gemma.groups for linear in group if not linear.tensors]
    if missing:
        yield Finding(severity="fails", message=f"config.json promises {listed(missing)}, which is in no shard")
    expected = {
        f"{linear.name}.weight": (linear.rows, linear.columns)
        for group in gemma.groups
        for linear in group
        if linear.is_plain or (gemma.quantization or {}).get("quant_method") == "compressed-tensors"
    }
    hidden = decoder_number(gemma.config, "hidden_size")
    vocabulary = text_config(gemma.config).get(
        "vocab_size", gemma.tensors[f"{gemma.prefix}embed_tokens.weight"].shape[0]
    )
    expected[f"{gemma.prefix}embed_tokens.weight"] = (vocabulary, hidden)
    norms = {
        name: (hidden,)
        for name in gemma.tensors
        if re.fullmatch(rf"{re.escape(gemma.prefix)}.*layernorm\.weight", name)
    }
    wrong = [
        f"{name} {list(gemma.tensors[name].shape)} instead of {list(shape)}"
        for name, shape in {**expected, **norms}.items()
        if name in gemma.tensors and gemma.tensors[name].shape != shape
    ]
    if wrong:
        yield Finding(severity="fails", message=f"config.json and the weights differ: {listed(wrong)}")


def quantization(inspection: Inspection) -> Iterator[Finding]:
    """What quantization_config says is quantized is, in its format, and nothing else is (compressed-tensors; vLLM)."""
    gemma = _found(inspection)
    if gemma is None:
        return
    linears = [linear for group in gemma.groups for linear in group if linear.tensors]
    config = gemma.quantization
    if config is None:
        wrong = [linear.name for linear in linears if not linear.is_plain]
        if wrong:
            yield Finding(
                severity="fails", message=f"{listed(wrong)} is quantized, and config.json has no quantization_config"
            )
    elif config.get("quant_method") == "compressed-tensors":
        if costly := _costly_patterns(config.get("ignore")):
            yield Finding(severity="unknown", message=f"{listed(costly)} in ignore takes too long to apply")
            return
        wrong = [f"{linear.name}: {flaw}" for linear in linears if (flaw := _flaw(linear, config))]
        if wrong:
            yield Finding(severity="fails", message=f"quantization_config and the weights differ: {listed(wrong)}")
    elif config.get("quant_method") == "bitsandbytes":
        dtype = "I8" if config.get("load_in_8bit") else "U8"
        found = {linear.tensors["weight"].dtype for linear in linears if "weight" in linear.tensors}
        if found - {dtype, *_PLAIN} or dtype not in found:
            yield Finding(
                severity="fails",
                message=f"bitsandbytes stores {dtype} here, and the weights are {listed(sorted(found))}",
            )


def fused_layers(inspection: Inspection) -> Iterator[Finding]:
    """Servers fuse q, k, v and gate, up into one matrix each, stored one way (vLLM, `packed_modules_mapping`)."""
    gemma = _found(inspection)
    for group in gemma.groups if gemma else ():
        ways = {
            frozenset((kind, one.dtype) for kind, one in linear.tensors.items()) for linear in group if linear.tensors
        }
        if len(ways) > 1:
            names = ", ".join(linear.name.rpartition(".")[2] for linear in group)
            yield Finding(
                severity="fails",
                message=f"{names} of {group[0].name.rpartition('.')[0]} are stored in different ways, "
                "and servers fuse them",
            )
            return


def tied_embeddings(inspection: Inspection) -> Iterator[Finding]:
    """A tied head is the embedding, stored once and in bf16 (transformers, `tie_word_embeddings`); else it is there."""
    gemma = _found(inspection)
    if gemma is None:
        return
    tied = gemma.config.get("tie_word_embeddings", text_config(gemma.config).get("tie_word_embeddings", True))
    heads = [one for name, one in gemma.tensors.items() if re.search(r"(^|\.)lm_head\.weight$", name)]
    if not tied and not heads:
        yield Finding(
            severity="fails", message="config.json unties the head from the embedding, and there is no lm_head"
        )
    if tied and heads:
        yield Finding(
            severity="warning",
            message=f"the head is tied to the embedding and stored again: {heads[0].size_bytes} bytes for nothing",
        )
    quantized = [
        name
        for name, one in gemma.tensors.items()
        if (is_embedding_or_head(name) and one.dtype not in _PLAIN)
        or re.search(r"(embed_tokens|lm_head)\.weight_(packed|scale)$", name)
    ]
    if quantized and tied:
        yield Finding(severity="fails", message=f"{listed(quantized)}: the embedding is the head, and it is quantized")


def _found(inspection: Inspection) -> _Gemma | None:
    """Return the Gemma, if all of it was reached and it is one; `known_family` says so where it is not."""
    try:
        return _gemma(inspection) if has_all_tensors(inspection) else None
    except CheckpointError:
        return None


def _gemma(inspection: Inspection) -> _Gemma:
    config, tensors = read_config(inspection) or {}, read_tensors(inspection)
    require_gemma(config)
    prefix = decoder_prefix(tensors)
    held: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        module, weight, rest = name.partition(".weight")
        if not weight:
            module, _, rest = name.rpartition(".")
        held.setdefault(module, {})[weight.lstrip(".") + rest] = tensor
    groups = [
        [
            _Linear(name=name, rows=rows, columns=columns, tensors=held.get(name, {}))
            for name in group
            for rows, columns in [linear_shape(config, name)]
        ]
        for layer in decoder_linears(config, prefix)
        for group in layer
    ]
    return _Gemma(config=config, tensors=tensors, prefix=prefix, groups=groups)


def _flaw(linear: _Linear, config: Mapping[str, Any]) -> str | None:
    """Return what a layer's tensors have wrong by a compressed-tensors config; None where nothing, or not known."""
    groups = config.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    scheme = group.get("weights") if isinstance(group, dict) else None
    targets = group.get("targets") if isinstance(group, dict) else None
    form = _STORED.get(str((group if isinstance(group, dict) else config).get("format") or config.get("format")))
    if _is_ignored(linear.name, config.get("ignore")):
        return None if linear.is_plain else "is ignored, and quantized"
    if not isinstance(scheme, dict) or form is None or not isinstance(targets, list) or "Linear" not in targets:
        return None
    if linear.is_plain:
        return f"is {linear.tensors['weight'].dtype}"
    for kind, dtypes in form.items():
        if kind not in linear.tensors:
            return f"has no {kind}"
        if linear.tensors[kind].dtype not in dtypes:
            return f"has a {kind} of {linear.tensors[kind].dtype}"
    for kind, shape in _stored_shapes(linear, scheme).items():
        if kind in linear.tensors and linear.tensors[kind].shape != shape:
            return f"has a {kind} of {list(linear.tensors[kind].shape)} instead of {list(shape)}"
    return None


def _stored_shapes(linear: _Linear, scheme: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of packed weights and of scales that a scheme implies, as far as it does."""
    shapes: dict[str, tuple[int, ...]] = {}
    bits, size, blocks = scheme.get("num_bits"), scheme.get("group_size"), scheme.get("block_structure")
    strategy = str(scheme.get("strategy"))
    if isinstance(bits, int) and bits > 0:
        per_word = 32 if "weight_packed" in linear.tensors and linear.tensors["weight_packed"].dtype == "I32" else 8
        shapes["weight_packed"] = (linear.rows, math.ceil(linear.columns * bits / per_word))
    if strategy == "channel":
        shapes["weight_scale"] = (linear.rows, 1)
    elif strategy in {"group", "tensor_group"} and isinstance(size, int) and size > 0:
        shapes["weight_scale"] = (linear.rows, math.ceil(linear.columns / size))
    elif (
        strategy == "block" and isinstance(blocks, list) and [type(one) for one in blocks] == [int, int] and all(blocks)
    ):
        shapes["weight_scale"] = (math.ceil(linear.rows / blocks[0]), math.ceil(linear.columns / blocks[1]))
    return shapes


def _costly_patterns(ignore: object) -> list[str]:
    """Return the patterns whose matching may take exponential time, or all of them where there are too many."""
    patterns = [str(one)[3:] for one in ignore if str(one).startswith("re:")] if isinstance(ignore, list) else []
    if len(patterns) > _MAX_PATTERNS:
        return patterns
    return [
        one
        for one in patterns
        if re.search(r"\)[*+?{]", one) or len(re.findall(r"[*+{]|(?<!\()\?", one)) > _MAX_REPEATS or len(one) > 500
    ]


def _is_ignored(name: str, ignore: object) -> bool:
    """Match as compressed-tensors does: by name, or from its start by `re:`; a decoder's layer under any prefix."""
    short = name[name.find("layers.") :]
    for entry in ignore if isinstance(ignore, list) else ():
        text = str(entry)
        if text.startswith("re:"):
            try:
                if re.match(text[3:], name):
                    return True
            except re.error:
                continue
        elif text == name or ("layers." in text and text[text.find("layers.") :] == short):
            return True
    return False
