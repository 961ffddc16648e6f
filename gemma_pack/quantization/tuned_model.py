"""The model that refinement trains: the base with a scaled product in the place of each rounded layer.

Where it does not fit the device, its layers stay in host memory: their weights come when they compute and go again,
forward and backward, and what lies between a layer's input and its output is computed once more on the way back
(gradient checkpointing, arXiv 1604.06174). The numbers are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma_pack.bfloat16 import attention, multiply_in_float32, product
from gemma_pack.gemma import attention_implementation
from gemma_pack.gpu_memory import free_gpu_bytes
from gemma_pack.quantization.memory import refinement_bytes
from gemma_pack.quantization.packing import unpack_codes

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from torch import Tensor

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.quantization.journal import Journal
    from gemma_pack.recipe import Recipe


class _ScaledProduct(torch.autograd.Function):
    """x Wᵀ with W = codes · scale, which is made anew in each direction instead of being kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor, scale: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        ctx.save_for_backward(inputs, codes, scale)
        return product(inputs, _weight(codes.to(inputs.device), scale).T)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, Tensor]:  # noqa: ANN401 - torch's own
        inputs, codes, scale = ctx.saved_tensors
        codes = codes.to(inputs.device)
        (gradient,) = grad_outputs
        by_weight = product(gradient.flatten(0, -2).T, inputs.flatten(0, -2))
        rows, groups = scale.shape
        by_scale = (by_weight.view(rows, groups, -1) * codes.view(rows, groups, -1)).sum(-1, dtype=torch.float32)
        return product(gradient, _weight(codes, scale)), None, by_scale.to(scale.dtype)


def _weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Return bfloat16 [rows, columns], the product that a server computes with."""
    rows, groups = scale.shape
    return (codes.to(torch.bfloat16).view(rows, groups, -1) * scale.unsqueeze(-1)).view(rows, -1)


class TunedLinear(torch.nn.Module):
    """A linear layer with fixed codes and a trainable scale."""

    def __init__(self, codes: Tensor, scale: Tensor, device: torch.device) -> None:
        """Start from int8 codes [rows, columns] and the scales [rows, groups] that they were rounded by.

        The codes stay where they are; wherever that is, `device` computes.
        """
        super().__init__()
        self.codes = codes
        self.start = scale.to(device, torch.float32)
        self.log_change = torch.nn.Parameter(torch.zeros_like(self.start))

    def scale(self) -> Tensor:
        """Return the scale as it is stored: bfloat16, with the gradient of the unrounded one."""
        exact = self.start * self.log_change.exp()
        return (exact + (exact.to(torch.bfloat16) - exact).detach()).to(torch.bfloat16)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs times the weight, transposed."""
        output: Tensor = _ScaledProduct.apply(inputs, self.codes, self.scale())  # type: ignore[no-untyped-call]
        return output


def must_stream(checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> bool:
    """Return whether the whole model is too large for a GPU."""
    return device.type == "cuda" and refinement_bytes(checkpoint, recipe) > free_gpu_bytes(device)


def load_untuned(checkpoint: Checkpoint, device: torch.device, *, streamed: bool) -> Any:  # noqa: ANN401 - a transformers model
    """Return the base on `device`; `streamed` leaves its layers in host memory and brings each when it computes."""
    from accelerate import cpu_offload
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory,
        dtype=torch.bfloat16,
        attn_implementation=attention(attention_implementation(checkpoint.config)),
        local_files_only=True,
    )
    multiply_in_float32(model)
    model.eval().requires_grad_(requires_grad=False)
    if not streamed:
        return model.to(device)
    decoder = model.get_decoder()
    for name, child in decoder.named_children():
        if name != "layers":
            child.to(device)
    model.get_output_embeddings().to(device)
    for layer in decoder.layers:
        cpu_offload(layer, execution_device=device, offload_buffers=True)
    return model


def replace_rounded(
    model: Any,  # noqa: ANN401 - a transformers model
    journal: Journal,
    scheme: QuantizationScheme,
    device: torch.device,
    *,
    streamed: bool,
) -> dict[str, TunedLinear]:
    """Put a `TunedLinear` in the place of each rounded layer; names are those of the checkpoint's tensors."""
    decoder = model.get_decoder()
    if streamed:  # a hook holds the weights of its whole layer, of modules that were replaced, too
        from accelerate.hooks import remove_hook_from_submodules

        for layer in decoder.layers:
            remove_hook_from_submodules(layer)
    modules = {}
    for path in journal.layers():
        tensors = journal.load(path.stem) or {}
        for key in sorted(tensors):  # safetensors gives them in another order in each process
            if not key.endswith(".weight_packed"):
                continue
            name = key.removesuffix(".weight_packed")
            parent, _, own = name[name.index("layers.") :].rpartition(".")
            codes, scale = unpack_codes(name, tensors, scheme)
            modules[name] = TunedLinear(codes if streamed else codes.to(device), scale, device)
            setattr(decoder.get_submodule(parent), own, modules[name])
    if streamed:
        _keep_inputs_alone(decoder, device)
    return modules


def _keep_inputs_alone(decoder: Any, device: torch.device) -> None:  # noqa: ANN401 - a transformers decoder
    """Let each layer compute its activations again on the way back; what is left of its weights stays on `device`."""
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in decoder.layers:
        layer.to(device)
        layer.training = True  # which checkpointing asks for; the modules inside stay as they were
