"""A model in this process, through transformers, on CPU or CUDA.

Base and variant run the same code: bf16 weights, the attention kernel that is right for the family, logits after the
model's own final soft-cap, in float32. A compressed-tensors variant is dequantized to bf16 when it is loaded, so its
weights are exactly what its scales and integers say; activations are still rounded where the scheme asks for it, as the
servers round them.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.checkpoint import read_json
from gemma_pack.console import format_bytes
from gemma_pack.errors import CheckpointError, MachineError, QuantizationError
from gemma_pack.evaluation.distributions import soft_capped_
from gemma_pack.gemma import attention_implementation, other_attention, require_bfloat16
from gemma_pack.machine import available_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

ROOM_BYTES: Final = 1_000_000_000
"""What scoring may take beside the resident models."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy continuation: token ids without the prompt, and whether the last of them is an end token."""

    tokens: tuple[int, ...]
    ended: bool


class Model:
    """A loaded model that gives hidden states, logits and greedy answers.

    `role` is how errors name it: `base` or `variant`. `soft_cap` is the final one of Gemma 2 and 4, None for others.
    """

    def __init__(self, module: Any, role: str, attention: str, other_attention: str | None = None) -> None:  # noqa: ANN401 - a transformers model
        """Take a transformers model with an output head, in evaluation mode, and the names of attention kernels."""
        self.module = module
        self.role = role
        self.attention = attention
        self.other_attention = other_attention
        text = module.config.get_text_config()
        self._head: Tensor = module.lm_head.weight
        self.soft_cap: float | None = getattr(text, "final_logit_softcapping", None)
        self._ends = _end_tokens(module)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = self.module.device
        return device

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the decoder's last hidden states, bf16 [batch, length, hidden], for int64 ids [batch, length]."""
        states: Tensor = self.module.model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return states

    @contextlib.contextmanager
    def attending(self, attention: str) -> Iterator[None]:
        """Use another attention kernel until the block ends."""
        from gemma_pack import bfloat16

        self.module.set_attn_implementation(bfloat16.attention(attention))
        try:
            yield
        finally:
            self.module.set_attn_implementation(bfloat16.attention(self.attention))

    def keep_head_alone(self) -> None:
        """Free the decoder; `logits` goes on working."""
        self.module.model = None

    @property
    def vocabulary_size(self) -> int:
        """The number of logits of a token."""
        return len(self._head)

    def products(self, hidden: Tensor, part: slice, room: Tensor) -> Tensor:
        """Return the head's products of hidden states [tokens, hidden] with the ids in `part`, bf16 [tokens, part].

        They are written to `room`, flat bf16, since fresh memory costs as much as a pass over it.
        """
        from gemma_pack.bfloat16 import product

        head = self._head[part].T
        size = len(hidden), head.shape[1]
        return product(hidden, head, out=room[: size[0] * size[1]].view(size))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states [tokens, hidden], float32 [tokens, vocabulary], after the soft-cap."""
        from gemma_pack.bfloat16 import product

        return soft_capped_(product(hidden, self._head.T).float(), self.soft_cap)

    def answers(self, prompts: Sequence[Sequence[int]], limit: int) -> list[Answer]:
        """Return the greedy continuations of `prompts`, answered together, of at most `limit` tokens each.

        Shorter prompts are padded on the left and the padding masked. Written out rather than left to `generate`,
        which merges in the sampling settings of generation_config.json.
        """
        import torch

        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        step, cache = ids, None
        answers: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for _ in range(limit):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
            output = self.module.model(
                input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            logits = self.logits(output.last_hidden_state[:, -1])
            step = logits.argmax(-1, keepdim=True)  # of numbers and NaN, NaN
            if not bool(torch.isfinite(logits.gather(1, step)).all()):
                self.fail_not_finite(ids)
            for row, token in enumerate(step[:, 0].tolist()):
                if not ended[row]:
                    answers[row].append(token)
                    ended[row] = token in self._ends
            if all(ended):
                break
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        return [Answer(tuple(tokens), end) for tokens, end in zip(answers, ended, strict=True)]

    def fail_not_finite(self, ids: Tensor) -> None:
        """Raise QuantizationError that names the first module whose output for `ids` is not finite."""
        culprit = self._first_not_finite(ids)
        raise QuantizationError(
            f"the {self.role} computes NaN or infinity, first in {culprit}",
            hint="its weights are damaged there; quantize again"
            if self.role == "variant"
            else "fetch the checkpoint again",
        )

    def _first_not_finite(self, ids: Tensor) -> str:
        """Run `ids` once more with an ear at every module; return the name of the first that is not finite."""
        import torch

        found: list[str] = []

        def listen(name: str) -> Any:  # noqa: ANN401 - a hook
            def hook(module: object, arguments: object, output: Any) -> None:  # noqa: ANN401 - whatever a module returns
                del module, arguments
                tensor = output[0] if isinstance(output, tuple) else output
                if not found and isinstance(tensor, torch.Tensor) and not bool(torch.isfinite(tensor).all()):
                    found.append(name)

            return hook

        leaves = [(n, m) for n, m in self.module.named_modules() if not any(True for _ in m.children())]
        handles = [module.register_forward_hook(listen(name)) for name, module in leaves]
        try:
            self.module.lm_head(self.hidden(ids))
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else "the output head"


def load(directory: Path, role: str, device: str) -> Model:
    """Load the checkpoint in `directory` onto `device`, `cpu` or `cuda`, for inference in bf16.

    Raises:
        CheckpointError: it is not bf16, or transformers cannot load it.
        MachineError: it does not fit.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from gemma_pack import bfloat16
    from gemma_pack.evaluation.engines import fused_layers
    from gemma_pack.evaluation.engines.activations import round_activations

    raw = read_json(directory / "config.json")
    require_bfloat16(raw)
    attention = attention_implementation(raw)
    config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    if isinstance(quantization := raw.get("quantization_config"), dict):
        config.quantization_config = dict(quantization)
        if quantization.get("quant_method") == "compressed-tensors":
            config.quantization_config["dequantize"] = True  # else at the first forward pass of the whole model only
    try:
        with _without_bars():
            module = AutoModelForCausalLM.from_pretrained(
                str(directory),
                config=config,
                dtype=torch.bfloat16,
                attn_implementation=bfloat16.attention(attention),
                device_map={"": device} if device != "cpu" else None,
                local_files_only=True,
                use_safetensors=True,
            )
    except torch.OutOfMemoryError as error:
        raise MachineError(f"the {role} does not fit on {device}", hint="use a larger GPU, or --device cpu") from error
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"transformers cannot load {directory}: {reason}", hint="gemma-pack doctor shows whether the versions fit"
        ) from error
    round_activations(module)
    bfloat16.multiply_in_float32(module)
    fused_layers.fuse(module, module.config.get_text_config().hidden_activation)
    module.eval()
    if isinstance(quantization, dict):
        # Quantized layers may lay their weights out anew in their first pass, which threads must not do at once.
        with torch.no_grad():
            module.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=module.device), use_cache=False)
    return Model(module, role, attention, other_attention(raw))


def fits_memory(size_bytes: int, device: str) -> bool:
    """Say whether `size_bytes` of weights and the room to score fit on `device`, as far as the system says."""
    available = _free_bytes(device)
    return available is None or size_bytes + ROOM_BYTES <= available


def require_memory(size_bytes: int, device: str) -> None:
    """Raise MachineError unless `size_bytes` of weights and the room to score fit on `device`."""
    if not fits_memory(size_bytes, device):
        raise MachineError(
            f"the models need {format_bytes(size_bytes + ROOM_BYTES)} on {device}, which has "
            f"{format_bytes(_free_bytes(device) or 0)} free",
            hint="validate on a machine with more memory",
        )


def _free_bytes(device: str) -> int | None:
    """Return the free memory of `device`; None where the system does not say."""
    if device == "cpu":
        return available_memory()
    from gemma_pack.gpu_memory import free_gpu_bytes

    return free_gpu_bytes()


def _end_tokens(module: Any) -> frozenset[int]:  # noqa: ANN401 - a transformers model
    """Return the ids that end an answer: of generation_config.json, else of config.json."""
    declared = getattr(module.generation_config, "eos_token_id", None)
    if declared is None:
        declared = module.config.get_text_config().eos_token_id
    return frozenset([declared] if isinstance(declared, int) else declared or [])


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the bars that transformers and compressed-tensors draw on stderr while loading out of our output."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
