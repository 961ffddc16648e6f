"""One decoder layer at a time.

A Gemma's decoder is its embedding and a stack of layers of one or two kinds: sliding and full attention. `Decoder`
holds the embedding and a single layer of each kind, and fills that layer with the weights of the one at hand, so
the memory it takes does not grow with the number of layers.
"""

from __future__ import annotations

import copy
from collections import UserDict
from typing import TYPE_CHECKING, Any

import torch

from gemma_pack.bfloat16 import attention, multiply_in_float32
from gemma_pack.errors import CheckpointError
from gemma_pack.gemma import attention_implementation, decoder_prefix, layer_number, layer_types

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor, nn

    from gemma_pack.checkpoint import Checkpoint

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


class Decoder:
    """The decoder of a bf16 checkpoint, of which one layer is resident at a time.

    Attributes:
        depth: number of decoder layers.
        width: of the hidden states.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        embedding: Tensor | None = None,
    ) -> None:
        """Build the embedding, one layer of each kind and the final norm on `device`.

        Layers compute in `dtype`. `embedding` is that of another decoder of the checkpoint, which then is held once.
        """
        self.checkpoint = checkpoint
        self.device = device
        self.prefix = decoder_prefix(checkpoint.tensors)
        self.kinds = layer_types(checkpoint.config)
        self.depth = len(self.kinds)
        first_of_kind = {kind: self.kinds.index(kind) for kind in self.kinds}
        self._model = _skeleton(checkpoint, first_of_kind, device, dtype)
        self._layers = dict(zip(first_of_kind, self._model.layers, strict=True))
        if embedding is None:
            _fill(self._model.embed_tokens, checkpoint, f"{self.prefix}embed_tokens.")
        else:
            self._model.embed_tokens.weight = torch.nn.Parameter(embedding, requires_grad=False)
            self._model.embed_tokens.register_forward_hook(lambda _module, _inputs, states: states.to(dtype))
        _fill(self._model.norm, checkpoint, f"{self.prefix}norm.")
        self.width: int = self._model.config.hidden_size

    @torch.no_grad()
    def embed(self, ids: np.ndarray[Any, np.dtype[np.int32]]) -> Tensor:
        """Return the hidden states that enter layer 0: [windows, tokens, width] for int32 [windows, tokens]."""
        states: Tensor = self._model.embed_tokens(torch.from_numpy(ids).long().to(self.device))
        return states

    @torch.no_grad()
    def finish(self, states: Tensor) -> Tensor:
        """Return what the final norm makes of the last layer's output."""
        normed: Tensor = self._model.norm(states)
        return normed

    @property
    def embedding(self) -> Tensor:
        """[vocabulary, width]: the embedding, which is the head too."""
        weight: Tensor = self._model.embed_tokens.weight
        return weight

    def within_layer(self, name: str) -> str:
        """Return a module's name within its layer, `mlp.up_proj`, from the one within the checkpoint."""
        return name.removeprefix(f"{self.prefix}layers.").partition(".")[2]

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of layer `index` by their names in the checkpoint, on the CPU."""
        start = f"{self.prefix}layers.{index}."
        return {name: read_tensor(self.checkpoint, name) for name in self.checkpoint.tensors if name.startswith(start)}

    def load_layer(self, index: int) -> nn.Module:
        """Fill the resident layer of this kind with the weights of layer `index` and return it."""
        layer: nn.Module = self._layers[self.kinds[index]]
        _fill(layer, self.checkpoint, f"{self.prefix}layers.{index}.")
        return layer

    @torch.no_grad()
    def layer_arguments(self, windows: int, tokens: int) -> dict[str, dict[str, Any]]:
        """Return the keyword arguments (masks, positions) that the model gives a layer, by kind of layer.

        They depend only on the shape of the input because calibration windows have no padding.
        """
        captured: list[dict[str, Any]] = []

        def capture(_layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
            kept = {key: value for key, value in kwargs.items() if key != "past_key_values"}
            if "shared_kv_states" in kept:
                kept["shared_kv_states"] = _Unread()
            captured.append(kept)
            return args, kwargs

        hooks = [layer.register_forward_pre_hook(capture, with_kwargs=True) for layer in self._layers.values()]
        try:
            self._model(input_ids=torch.zeros((windows, tokens), dtype=torch.long, device=self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return dict(zip(self._layers, captured, strict=True))


class _Unread(UserDict[str, Any]):
    """Where Gemma 4's layers leave keys and values for later layers that share them; no supported model has such."""

    def __setitem__(self, kind: str, states: object) -> None:
        """Drop them."""


def _skeleton(
    checkpoint: Checkpoint, first_of_kind: Mapping[str, int], device: torch.device, dtype: torch.dtype
) -> Any:  # noqa: ANN401 - a transformers model
    """Return the text model with one layer of each kind, its parameters uninitialised.

    `first_of_kind` says which layer has the shapes of its kind.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    config = copy.deepcopy(config.get_text_config())
    config.layer_types = list(first_of_kind)
    config.num_hidden_layers = len(first_of_kind)
    if config.is_heterogeneous:  # Gemma 4's full layers have heads of their own
        config.per_layer_config = {
            slot: {name: layer_number(checkpoint.config, name, layer) for name in ("head_dim", "num_key_value_heads")}
            for slot, layer in enumerate(first_of_kind.values())
        }
    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention(attention_implementation(checkpoint.config))
        )
    multiply_in_float32(model)
    return model.eval().requires_grad_(requires_grad=False).model


def _fill(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    """Copy the tensors named `prefix` + parameter name into the module, in place."""
    for name, tensor in module.state_dict().items():  # parameters, and buffers such as Gemma 4's `layer_scalar`
        tensor.copy_(read_tensor(checkpoint, prefix + name))


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return tensor `name` on the CPU, in its own dtype."""
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{checkpoint.directory} has no tensor {name}", hint="fetch the checkpoint again")
    if info.dtype not in _DTYPES:
        raise CheckpointError(f"{name} is {info.dtype}, not BF16", hint="use the bfloat16 checkpoint")
    return torch.frombuffer(bytearray(info.read()), dtype=_DTYPES[info.dtype]).reshape(info.shape)
