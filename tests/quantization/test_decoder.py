from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from gemma_pack.bfloat16 import attention, multiply_in_float32
from gemma_pack.checkpoint import Checkpoint
from gemma_pack.quantization import hidden_states
from gemma_pack.quantization.decoder import Decoder
from gemma_pack.quantization.hidden_states import HiddenStates
from gemma_pack.quantization.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3", "gemma4_text", "gemma4", "gemma4_unified"])
def test_windows_that_travel_layer_by_layer_end_where_the_whole_model_takes_them(
    tiny_checkpoints: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    directory = tiny_checkpoints(family)
    # 80 tokens are more than the sliding window of 32, 5 windows are no whole number of batches
    ids = np.random.default_rng(0).integers(4, 500, size=(5, 80), dtype=np.int32)
    decoder = Decoder(Checkpoint.open(directory), torch.device("cpu"))
    stream = HiddenStates(decoder, ids, tmp_path, Ranks())
    stream.batch = 2
    assert stream.begin(decoder.depth) == 0
    for index in range(decoder.depth):
        stream.advance(index, [])

    with_images = family in ("gemma3", "gemma4", "gemma4_unified")
    loader = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    kernel = attention("eager" if family == "gemma2" else "sdpa")  # as the decoder has it, and its products
    model = loader.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation=kernel).eval()
    multiply_in_float32(model)
    decoder_module = model.model.language_model if with_images else model.model
    found: list[torch.Tensor] = []
    decoder_module.layers[-1].register_forward_hook(lambda _module, _args, output: found.append(output))
    with torch.no_grad():
        for rows in torch.from_numpy(ids).long().split(2):
            model(input_ids=rows, use_cache=False)
    assert AutoConfig.from_pretrained(directory).get_text_config().num_hidden_layers == decoder.depth
    assert torch.equal(torch.cat(found), stream.states)


def test_statistics_are_of_the_windows_and_of_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Asking the model for masks and positions takes a pass over padding, which must not be counted."""
    ids = np.random.default_rng(0).integers(4, 500, size=(5, 80), dtype=np.int32)
    decoder = Decoder(Checkpoint.open(tiny_checkpoint), torch.device("cpu"))
    stream = HiddenStates(decoder, ids, tmp_path, Ranks())
    stream.batch = 2
    stream.begin(0)
    [seen] = stream.advance(0, [["model.layers.0.self_attn.q_proj"]])
    assert int(seen.tokens) == 5 * 80
    inputs = decoder.load_layer(0).input_layernorm(decoder.embed(ids)).flatten(0, 1).float()
    assert torch.allclose(seen.total, inputs.T @ inputs, rtol=0.01, atol=0.01 * float(seen.total.abs().max()))


def test_a_process_without_windows_sees_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    decoder = Decoder(Checkpoint.open(tiny_checkpoint), torch.device("cpu"))
    stream = HiddenStates(decoder, np.empty((0, 80), np.int32), tmp_path, Ranks())
    stream.begin(0)
    [seen] = stream.advance(0, [["model.layers.0.self_attn.q_proj"]])
    assert int(seen.tokens) == 0


def test_states_are_not_kept_where_the_layers_need_the_room(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(Checkpoint.open(tiny_checkpoint), torch.device("cpu"))
    stream = HiddenStates(decoder, np.full((2, 80), 5, np.int32), tmp_path, Ranks())
    size_bytes = 2 * stream.states.numel()
    for free, kept in ((2 * size_bytes - 1, []), (2 * size_bytes, ["kept.1"])):
        monkeypatch.setattr(hidden_states.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        stream.keep(1)
        assert [path.name for path in tmp_path.iterdir()] == kept


def test_a_disk_without_room_for_the_states_is_found_before_they_are_written(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a mapped file on a full disk ends a process by a signal."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hidden_states, "MAX_STATES_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    decoder = Decoder(Checkpoint.open(tiny_checkpoint), torch.device("cpu"))
    with pytest.raises(OSError, match="No space left"):
        HiddenStates(decoder, np.full((2, 80), 5, np.int32), tmp_path, Ranks())


def test_a_missing_tensor_is_named(tiny_checkpoint: Path) -> None:
    from gemma_pack.errors import CheckpointError

    whole = Checkpoint.open(tiny_checkpoint)
    tensors = {name: info for name, info in whole.tensors.items() if "layers.1.mlp.up_proj" not in name}
    decoder = Decoder(Checkpoint(directory=whole.directory, config=whole.config, tensors=tensors), torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        decoder.load_layer(1)
