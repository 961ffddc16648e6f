"""How vLLM is started on a Gemma, the same for every target."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Final

from gemma_pack.deploy.resources import GPU_MEMORY_UTILIZATION
from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from gemma_pack.deploy.image import ServedImage
    from gemma_pack.deploy.resources import Resources

PROMPT: Final = "Write me a poem about Machine Learning."
"""The prompt of the Gemma model card."""
MAX_TOKENS: Final = 64
"""Of the answer: without a limit, a model that does not end its turn would fill the whole context."""


def require_servable(config: Mapping[str, Any], name: str) -> None:
    """Raise InvalidUsageError if no vLLM of today loads the checkpoint `name` with this config.json.

    vLLM 0.32 has no loader of bitsandbytes' format (`vllm/model_executor/layers/quantization`); earlier ones had.
    """
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes":
        raise InvalidUsageError(
            f"{name} is in bitsandbytes' format, which vLLM dropped: only transformers loads it",
            hint="gemma-pack chat or generate runs it; to serve, quantize the base by w4a16 or w8a16",
        )


def server_arguments(name: str, resources: Resources) -> list[str]:
    """Return the options of `vllm serve` that belong to one variant; `name` is what clients call it."""
    split = [f"--tensor-parallel-size={resources.gpus}"] if resources.gpus > 1 else []
    return [f"--served-model-name={name}", *engine_arguments(resources), *split]


def engine_arguments(resources: Resources) -> list[str]:
    """Return those of the options that say how much memory and context the engine takes."""
    return [f"--max-model-len={resources.max_model_len}", f"--gpu-memory-utilization={GPU_MEMORY_UTILIZATION}"]


def request(image: ServedImage, name: str) -> tuple[str, str]:
    """Return path, below /v1/, and JSON body of the call of the OpenAI API that shows that the server answers."""
    return request_of(name, chat=image.answers_chat)


def request_of(name: str, *, chat: bool) -> tuple[str, str]:
    """Return the same for a model of that name: only one with a chat template answers, others continue text."""
    path = "chat/completions" if chat else "completions"
    ask = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    return path, json.dumps({"model": name, **ask, "max_tokens": MAX_TOKENS})


def curl_command(image: ServedImage, name: str, base_url: str) -> str:
    """Return that call as a line for a shell."""
    return curl_of(name, base_url, chat=image.answers_chat)


def curl_of(name: str, base_url: str, *, chat: bool) -> str:
    """Return the same for a model of that name."""
    path, body = request_of(name, chat=chat)
    return f"curl {base_url}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
