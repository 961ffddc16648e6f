"""Red Hat AI Inference Server with podman: a run script, and the same container as a systemd service.

The modelcar is mounted as it is (`--mount type=image`), so its files lie under /modelcar/models; they are readable for
everyone, so the server's user needs no mapping. SELinux stays on: the boolean lets containers use the GPU.

Sources: Red Hat AI Inference Server, Getting started; podman-run(1); podman-systemd.unit(5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gemma_pack.deploy.bundle import Bundle, BundleFile, is_gemma_4, provenance_warnings
from gemma_pack.deploy.resources import GIB
from gemma_pack.deploy.server import curl_command, server_arguments
from gemma_pack.deploy.templating import render

if TYPE_CHECKING:
    from gemma_pack.deploy.image import ServedImage
    from gemma_pack.deploy.options import Options
    from gemma_pack.deploy.resources import Resources

SERVER_IMAGE: Final = "registry.redhat.io/rhaii/vllm-cuda-rhel9:3.4.0"
"""Red Hat's server by release; its registry wants a login, so nothing here can look up the digest."""


def rhaiis_bundle(image: ServedImage, resources: Resources, options: Options) -> Bundle:
    """Return a run script and a quadlet that serve `image`."""
    options.refuse_for("rhaiis", "storage_scheme", "pull_secret")
    image.require_modelcar()
    name = options.name or image.name
    server_image = options.server_image or SERVER_IMAGE
    values = {
        "about": image.describe(),
        "arithmetic": resources.explain(),
        "name": name,
        "reference": image.reference,
        "server_image": server_image,
        "shared_memory": f"{resources.shared_memory_bytes // GIB}g",
        "arguments": ["--dtype=bfloat16", *server_arguments(name, resources)],
    }
    return Bundle(
        target="rhaiis",
        files=(
            BundleFile(name="run.sh", text=render("rhaiis/run.sh", **values)),
            BundleFile(name=f"{name}.container", text=render("rhaiis/quadlet.container", **values)),
        ),
        steps=(
            f"podman login {server_image.partition('/')[0]}",
            "sudo setsebool -P container_use_devices 1  # once, where SELinux is on",
            f"sh {options.file('run.sh')}",
            curl_command(image, name, "http://127.0.0.1:8000"),
        ),
        warnings=(*provenance_warnings(image), *_too_old(image, options)),
    )


def _too_old(image: ServedImage, options: Options) -> tuple[str, ...]:
    """Return a warning where our default server, which has vLLM 0.18, knows no such model."""
    if options.server_image or not is_gemma_4(image):
        return ()
    return (f"{SERVER_IMAGE} has vLLM 0.18, and Gemma 4 came with 0.19: name a later one with --server-image",)
