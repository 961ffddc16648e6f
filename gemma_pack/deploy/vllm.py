"""vLLM on this machine: the line that starts its server, and a script that asks the variant in process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_pack.deploy.bundle import Bundle, BundleFile, provenance_warnings
from gemma_pack.deploy.resources import GPU_MEMORY_UTILIZATION
from gemma_pack.deploy.server import PROMPT, curl_command, server_arguments
from gemma_pack.deploy.templating import render

if TYPE_CHECKING:
    from gemma_pack.deploy.image import ServedImage
    from gemma_pack.deploy.options import Options
    from gemma_pack.deploy.resources import Resources


def vllm_bundle(image: ServedImage, resources: Resources, options: Options) -> Bundle:
    """Return a shell script and a Python script that serve `image` with an installed vLLM."""
    options.refuse_for("vllm", "server_image", "storage_scheme", "pull_secret")
    image.require_modelcar()
    name = options.name or image.name
    directory = f"{name}-{image.short_digest}"
    serve = render(
        "vllm/serve.sh",
        about=image.describe(),
        arithmetic=resources.explain(),
        name=name,
        directory=directory,
        reference=image.reference,
        arguments=["--dtype=bfloat16", *server_arguments(name, resources)],
    )
    generate = render(
        "vllm/generate.py",
        about=image.describe(),
        name=name,
        directory=directory,
        reference=image.reference,
        max_model_len=resources.max_model_len,
        gpu_memory_utilization=GPU_MEMORY_UTILIZATION,
        gpus=resources.gpus,
        chat=image.answers_chat,
        prompt=PROMPT,
    )
    return Bundle(
        target="vllm",
        files=(BundleFile(name="serve.sh", text=serve), BundleFile(name="generate.py", text=generate)),
        steps=(f"sh {options.file('serve.sh')}", curl_command(image, name, "http://127.0.0.1:8000")),
        warnings=provenance_warnings(image),
    )
