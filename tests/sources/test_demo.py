from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.console import Console
from gemma_pack.errors import MachineError, SourceError
from gemma_pack.record import require_record
from gemma_pack.sources import demo

if TYPE_CHECKING:
    from pathlib import Path

PROSE = """\
The ferry left the harbour a little after six, when the fog had thinned enough for the captain to see the second buoy.
Most of the passengers stayed inside, holding paper cups of coffee and looking at nothing in particular, but a boy of
perhaps nine stood at the rail with his hood up and counted the gulls. His grandmother had told him that there were
always more on the way out than on the way home, and he wanted to find out whether this was true. By the time they
passed the lighthouse he had reached forty-one and lost his place twice. On the island nobody met them. The road from
the pier climbed between stone walls, past a chapel with a new roof and a school that had been turned into a shop, and
ended at a gate which the old woman opened with a key she wore around her neck."""


@given(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127))
def test_rounding_to_bf16_is_to_nearest_with_ties_to_even(value: float):
    def bf16(bits: int) -> float:
        return float(np.array([bits << 16], "<u4").view("<f4")[0])

    bits = int.from_bytes(demo.round_to_bf16(np.array([value], np.float32)), "little")
    error = abs(bf16(bits) - value)
    for neighbour in {(bits - 1) & 0xFFFF, (bits + 1) & 0xFFFF}:
        if not math.isfinite(bf16(neighbour)):
            continue
        other = abs(bf16(neighbour) - value)
        assert error < other or (error == other and bits % 2 == 0)


def test_rounding_to_bf16_agrees_with_torch():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert demo.round_to_bf16(values) == expected


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.17.post_ffw_norm.weight", "model.layers.17.post_feedforward_layernorm.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.pre_feedforward_layernorm.weight"),
    ],
)
def test_names_are_translated(gguf_name: str, name: str):
    assert demo.hugging_face_name(gguf_name) == name


def test_a_tensor_that_gemma_3_does_not_have_is_refused():
    with pytest.raises(SourceError, match=r"blk\.0\.ssm_a\.weight"):
        demo.hugging_face_name("blk.0.ssm_a.weight")


def test_without_the_extra_the_hint_is_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MachineError) as caught:
        demo.assemble_demo(tmp_path / "demo", Console("quiet"))
    assert caught.value.hint == "pip install 'gemma-pack[demo]'"
    assert caught.value.exit_code == 12


def test_other_chunks_are_refused_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    chunk = tmp_path / "chunk"
    chunk.write_bytes(b"GGUF but not the one")
    monkeypatch.setattr(demo, "_package_files", lambda: ([chunk, chunk], tmp_path / "GEMMA_TERMS.html"))
    with pytest.raises(SourceError, match="sha256"):
        demo.assemble_demo(tmp_path / "out" / "demo", Console("quiet"))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_chunk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(demo, "_package_files", lambda: ([tmp_path / "gone"], tmp_path / "GEMMA_TERMS.html"))
    with pytest.raises(SourceError, match="gone"):
        demo.assemble_demo(tmp_path / "demo", Console("quiet"))


@pytest.mark.real
def test_the_checkpoint_is_gemma_3_270m_in_bf16(demo_checkpoint: Path):
    checkpoint = Checkpoint.open(demo_checkpoint)
    assert len(checkpoint.tensors) == 236
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert sum(info.parameters for info in checkpoint.tensors.values()) == 268_098_176
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].shape == (1024, 640)
    source = require_record(demo_checkpoint).source
    assert source.kind == "demo"
    digests = {file.path: file.sha256 for file in source.files}
    assert digests["model.safetensors"] == "d9df495ac8121f17441f73a45548b59cd75068fbd5e57ed0883c9e4a443fe908"
    assert "GGUF" in (source.note or "")
    assert {file.path for file in source.files} == {
        path.name for path in demo_checkpoint.iterdir() if path.name != "gemma-pack.json"
    }
    assert "ai.google.dev/gemma/terms" in (demo_checkpoint / "NOTICE").read_text("utf-8")


@pytest.mark.real
def test_transformers_reads_the_rope_of_each_layer_type(demo_checkpoint: Path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_checkpoint)
    assert {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()} == {
        "full_attention": 1e6,
        "sliding_attention": 1e4,
    }
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.sliding_window == 512


@pytest.mark.real
def test_known_ids_and_round_trips(demo_checkpoint: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    # ids of the published tokenizer
    assert tokenizer("The capital of France is").input_ids == [2, 818, 5279, 529, 7001, 563]
    assert tokenizer("Hello").input_ids == [2, 9259]
    assert tokenizer("12").input_ids[1:] == [236770, 236778]  # digits are split
    assert tokenizer("a\n\n\n  b").input_ids[1:] == [236746, 109, 138, 236763]
    assert tokenizer("<start_of_turn>user").input_ids == [2, 105, 2364]
    for text in ("The café — 日本語 🙂 ꙮ\u200b", "def f(x):\n\treturn x  # <b>bold</b>", " " * 45 + "x", "x " * 9):
        ids = tokenizer(text).input_ids
        assert ids.count(2) == 1
        assert ids[0] == 2
        assert tokenizer.decode(ids[1:]) == text
    special = json.loads((demo_checkpoint / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    assert next(token for token in special if token["content"] == "<b>")["special"] is False
    assert next(token for token in special if token["content"] == "<bos>")["special"] is True


@pytest.mark.real
def test_the_model_speaks_english(demo_checkpoint: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.bfloat16).eval()
    ids = tokenizer(PROSE, return_tensors="pt").input_ids
    with torch.no_grad():
        nll = model(ids, labels=ids).loss.item()
        prompt = tokenizer("The capital city of France is called", return_tensors="pt")
        answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert 15 < math.exp(nll) < 40  # 27.4 when written; 261 without <bos>
    assert "Paris" in answer
