"""Images of a tiny Gemma, all headers and zeros, written by the standard library: right, or wrong on purpose."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gemma_pack.oci.layout import create_layout
from gemma_pack.oci.manifest import (
    CONFIG_TYPE,
    GZIP_LAYER_TYPE,
    LAYER_TYPE,
    Manifest,
    describe,
    encode_json,
    sha256_digest,
)
from gemma_pack.safetensors_file import DTYPE_BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by name."""
CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}
W4A16: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
        }
    },
    "ignore": ["lm_head"],
}
SHAPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}  # fmt: skip


def linears() -> Iterable[tuple[str, tuple[int, int]]]:
    return ((f"model.layers.{layer}.{name}", shape) for layer in range(2) for name, shape in SHAPES.items())


def plain() -> Tensors:
    """Return the tensors of the bf16 model."""
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (100, 64)), "model.norm.weight": ("BF16", (64,))}
    for layer in range(2):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = ("BF16", (64,))
    return tensors | {f"{name}.weight": ("BF16", shape) for name, shape in linears()}


def packed() -> Tensors:
    """Return those of the model in W4A16."""
    tensors = {name: one for name, one in plain().items() if "_proj" not in name}
    for name, (rows, columns) in linears():
        tensors[f"{name}.weight_packed"] = ("I32", (rows, columns // 8))
        tensors[f"{name}.weight_scale"] = ("BF16", (rows, columns // 32))
        tensors[f"{name}.weight_shape"] = ("I64", (2,))
    return tensors


def stored(dtype: str, **scheme: object) -> tuple[Tensors, dict[str, Any]]:
    """Return tensors with one byte a weight and a scale a row, and their quantization_config."""
    tensors = {name: one for name, one in plain().items() if "_proj" not in name}
    for name, (rows, columns) in linears():
        tensors |= {f"{name}.weight": (dtype, (rows, columns)), f"{name}.weight_scale": ("BF16", (rows, 1))}
    form = "int-quantized" if dtype == "I8" else "float-quantized"
    weights = {"num_bits": 8, "strategy": "channel", **scheme}
    return tensors, W4A16 | {"format": form, "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}


def safetensors(tensors: Tensors) -> bytes:
    """Return a file of zeros."""
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = DTYPE_BITS[dtype] // 8
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(position)


def model(
    tensors: Tensors | None = None, config: Mapping[str, Any] | None = None, **files: bytes | None
) -> dict[str, bytes]:
    """Return the files of a checkpoint in two shards; `files` replace some, or with None take them away.

    Their names are written with `_` for `.` and with `__` for `_`.
    """
    tensors = plain() if tensors is None else tensors
    halves = [dict(sorted(tensors.items())[0::2]), dict(sorted(tensors.items())[1::2])]
    shards = {f"model-{number:05d}-of-00002.safetensors": half for number, half in enumerate(halves, 1)}
    weight_map = {name: shard for shard, half in shards.items() for name in half}
    found: dict[str, bytes | None] = {
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{} ",
        **{name: safetensors(half) for name, half in shards.items()},
        "config.json": json.dumps(CONFIG | dict(config or {})).encode(),
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
    }
    found |= {name.replace("__", "/").replace("_", ".").replace("/", "_"): data for name, data in files.items()}
    return {name: data for name, data in found.items() if data is not None}


@dataclass(frozen=True)
class Image:
    """An image before it is written: members of its tars, and what is said of them."""

    layers: tuple[tuple[tuple[tarfile.TarInfo, bytes], ...], ...]
    """Of members."""
    types: tuple[str, ...]
    titles: tuple[str | None, ...]
    runtime: Mapping[str, Any] = field(default_factory=dict)
    diff_ids: tuple[str, ...] | None = None
    config_type: str = CONFIG_TYPE

    def write(self, directory: Path) -> Path:
        """Write it as an OCI layout."""
        tars = [_tar(members) for members in self.layers]
        blobs = [
            gzip.compress(tar, 1) if kind.endswith("gzip") else tar for tar, kind in zip(tars, self.types, strict=True)
        ]
        config = encode_json({
            "architecture": "amd64",
            "os": "linux",
            "config": dict(self.runtime),
            "rootfs": {"type": "layers", "diff_ids": list(self.diff_ids or map(sha256_digest, tars))},
        })  # fmt: skip
        with create_layout(directory) as writer:
            for blob in (config, *blobs):
                writer.write_document(blob)
            layers = tuple(
                describe(blob, kind, annotations={"org.opencontainers.image.title": title} if title else {})
                for blob, kind, title in zip(blobs, self.types, self.titles, strict=True)
            )
            manifest = Manifest(config=describe(config, self.config_type), layers=layers).encode()
            writer.write_document(manifest)
            writer.add_image(describe(manifest, "application/vnd.oci.image.manifest.v1+json"))
        return directory

    def each(self, change: Callable[[tarfile.TarInfo], None], where: str = "") -> Image:
        """Return the image with the headers of those members changed whose names contain `where`."""
        layers = []
        for members in self.layers:
            copied = [(_copy(info), data) for info, data in members]
            for info, _ in copied:
                if where in info.name:
                    change(info)
            layers.append(tuple(copied))
        return replace(self, layers=tuple(layers))

    def add(self, *members: tuple[tarfile.TarInfo, bytes], kind: str = LAYER_TYPE) -> Image:
        """Return the image with one more layer."""
        return replace(
            self,
            layers=(*self.layers, members),
            types=(*self.types, kind),
            titles=(*self.titles, "more.tar"),
        )


def image(files: Mapping[str, bytes] | None = None, *, kind: str = LAYER_TYPE) -> Image:
    """Return a modelcar: a base with a shell, a layer for each shard, and one for the rest."""
    found = model() if files is None else files
    shards = {name: data for name, data in found.items() if name.endswith(".safetensors")}
    rest = {name: data for name, data in found.items() if name not in shards}
    base = tuple(member(f"bin/{name}", b"#!", mode=0o755) for name in ("sh", "ls", "ln", "sleep"))
    folder = member("models", None)
    layers: list[tuple[tuple[tarfile.TarInfo, bytes], ...]] = [
        base,
        *((folder, member(f"models/{name}", data)) for name, data in shards.items()),
    ]
    layers.append((folder, *(member(f"models/{name}", data) for name, data in rest.items())))
    titles = (None, *(f"{name}.tar" for name in shards), "rest.tar")
    return Image(layers=tuple(layers), types=(GZIP_LAYER_TYPE, *[kind] * (len(layers) - 1)), titles=titles)


def member(
    name: str, data: bytes | None = b"", *, mode: int | None = None, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    """Return a file, a link, or, with None for its data, a directory."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.SYMTYPE if link else tarfile.DIRTYPE if data is None else tarfile.REGTYPE
    info.linkname = link
    info.size = 0 if link else len(data or b"")
    info.mode = mode if mode is not None else 0o755 if data is None else 0o644
    return info, data or b""


def _copy(info: tarfile.TarInfo) -> tarfile.TarInfo:
    copied = tarfile.TarInfo()
    for name in ("name", "type", "linkname", "size", "mode", "uid", "gid", "pax_headers"):
        setattr(copied, name, getattr(info, name))
    return copied


def _tar(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()
