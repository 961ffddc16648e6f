"""Loading a checkpoint by a plan, through transformers, without a bar of its own on stderr."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

from gemma_pack.errors import CheckpointError, MachineError
from gemma_pack.gemma import attention_implementation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from gemma_pack.chat.presets import Plan
    from gemma_pack.checkpoint import Checkpoint


def load_module(checkpoint: Checkpoint, plan: Plan, offload: Path) -> Any:  # noqa: ANN401 - a transformers model
    """Return the model of a checkpoint, loaded as the plan says, in evaluation mode.

    Args:
        checkpoint: base or variant.
        plan: what `choose` returned for it.
        offload: an empty directory that outlives the model; the index of what stays on disk goes there.

    Raises:
        CheckpointError: transformers cannot load it.
        MachineError: it does not fit.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from gemma_pack import bfloat16

    config = AutoConfig.from_pretrained(str(checkpoint.directory), local_files_only=True)
    said = checkpoint.config.get("quantization_config")
    compressed = isinstance(said, dict) and said.get("quant_method", "compressed-tensors") == "compressed-tensors"
    if isinstance(said, dict) and compressed:
        config.quantization_config = {**said, "dequantize": plan.precision != "packed"}
    options: dict[str, Any] = {"device_map": {"": plan.device}} if plan.device != "cpu" else {}
    if plan.precision in ("int8", "nf4") or (said and not compressed):
        options = {"device_map": {"": plan.device}}  # bitsandbytes wants to be told even of the CPU
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of its float16 in each layer, each time
    if plan.precision in ("int8", "nf4"):
        options["quantization_config"] = _bitsandbytes(plan.precision)
    if plan.preset == "memory-extreme":
        options = {"device_map": _one_layer_at_a_time(config, plan.device), "offload_folder": str(offload)}
    as_float32 = plan.precision == "float32" and not compressed
    attention = attention_implementation(checkpoint.config)
    if plan.preset != "speed":  # which compiles torch's own kernel
        attention = bfloat16.attention(attention)
    try:
        with _quietly():
            module = AutoModelForCausalLM.from_pretrained(
                str(checkpoint.directory),
                config=config,
                dtype=torch.float32 if as_float32 else torch.bfloat16,
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                **options,
            )
    except torch.OutOfMemoryError as error:
        hint = "use --preset memory or memory-extreme, or --device cpu"
        raise MachineError(f"the model does not fit on {plan.device}", hint=hint) from error
    except (ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"transformers cannot load {checkpoint.directory}: {reason}",
            hint="gemma-pack doctor shows whether the versions fit",
        ) from error
    return _finished(module.eval(), plan, packed=compressed and plan.precision == "packed")


def _finished(module: Any, plan: Plan, *, packed: bool) -> Any:  # noqa: ANN401 - a transformers model
    if packed:
        from gemma_pack.chat.packed import keep_packed

        keep_packed(module)
    elif plan.precision == "float32":
        module.float()  # a variant, unpacked to bf16 before
    return module


def _bitsandbytes(precision: str) -> Any:  # noqa: ANN401 - a BitsAndBytesConfig
    """Say all of it: the default of 4 bits is still fp4, and the default compute dtype float32."""
    import torch
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _one_layer_at_a_time(config: Any, device: str) -> dict[str, torch.device | str]:  # noqa: ANN401 - of transformers
    """Return a device map that keeps all but the decoder layers on `device`, and those in host memory or on disk."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config)
    away = "disk" if device == "cpu" else "cpu"
    places: dict[str, torch.device | str] = {}

    def place(name: str, module: torch.nn.Module) -> None:
        children = list(module.named_children())
        if type(module).__name__.endswith("DecoderLayer"):
            places[name] = away
        elif any(type(inner).__name__.endswith("DecoderLayer") for inner in module.modules()):
            for child, inner in children:
                place(f"{name}.{child}" if name else child, inner)
        else:
            places[name] = device

    place("", empty)
    return places


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep bars, and the advice of libraries to install others, out of our output while a model loads."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
