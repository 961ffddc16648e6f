"""KServe, and so OpenShift AI: a ServingRuntime and an InferenceService, with a pull secret on request.

Beside them, for those who want them: an LLMInferenceService in their place, a DaemonSet that pulls the weights onto the
nodes before the first pod waits for them, and a Job that asks the served model.

Sources: the CRDs serving.kserve.io/v1alpha1, v1alpha2 and v1beta1; pkg/utils/storage.go of KServe for the `oci` schemes
and for what they need of an image; config/runtimes/kserve-vllmserver.yaml and config/llmisvcconfig for the containers
that KServe itself runs.
"""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.console import format_bytes
from gemma_pack.deploy.bundle import Bundle, BundleFile, provenance_warnings
from gemma_pack.deploy.options import STORAGE_SCHEMES
from gemma_pack.deploy.resources import GIB
from gemma_pack.deploy.server import curl_command, engine_arguments, request, server_arguments
from gemma_pack.deploy.templating import render

if TYPE_CHECKING:
    from gemma_pack.deploy.image import ServedImage
    from gemma_pack.deploy.options import Options
    from gemma_pack.deploy.resources import Resources

RUNTIME_VERSION: Final = "v0.30.0"
RUNTIME_IMAGE: Final = (
    "docker.io/vllm/vllm-openai@sha256:8a69ffad015f138d7170c4ddc429e230a3bc1c1719f67e14324749df200a4b90"
)
"""The project's own server image at RUNTIME_VERSION, pinned: its index of all platforms."""
PAUSE_IMAGE: Final = "registry.k8s.io/pause:3.10"
"""Kubernetes' own container that does nothing: no node runs without one."""
CURL_IMAGE: Final = "docker.io/curlimages/curl:8.10.1"
"""The curl project's own image."""
SMOKE_TRIES: Final = 180
"""Ten seconds apart: the 30 minutes that the server has to start."""


def kserve_bundle(image: ServedImage, resources: Resources, options: Options) -> Bundle:
    """Return the manifests that serve `image` in a cluster."""
    image.require_modelcar()
    name = options.name or image.name
    files = [
        BundleFile(name="serving-runtime.yaml", text=_serving_runtime(name, resources, options)),
        BundleFile(name="inference-service.yaml", text=_inference_service(image, name, resources, options)),
    ]
    forms = []
    if options.pull_secret:
        values = {"name": name, "pull_secret": options.pull_secret, "host": _auth_key(image.host)}
        files.insert(0, BundleFile(name="service-account.yaml", text=render("kserve/service-account.yaml", **values)))
        forms.append(
            BundleFile(name="pull-secret.yaml", text=render("kserve/pull-secret.yaml", **values), printed=False)
        )
    forms += [
        BundleFile(
            name="llm-inference-service.yaml", text=_llm_service(image, name, resources, options), printed=False
        ),
        BundleFile(name="prepull.yaml", text=_prepull(image, name, resources, options), printed=False),
        BundleFile(name="smoke.yaml", text=_smoke(image, name), printed=False),
    ]
    kustomization = render("kserve/kustomization.yaml", resources=[file.name for file in files])
    forms.append(BundleFile(name="kustomization.yaml", text=kustomization, printed=False))
    return Bundle(
        target="kserve",
        files=(*files, *forms),
        steps=_steps(image, name, options),
        warnings=_warnings(image, options),
    )


def _serving_runtime(name: str, resources: Resources, options: Options) -> str:
    return render(
        "kserve/serving-runtime.yaml",
        about=["Written by gemma-pack deploy: vLLM as Gemma needs it."],
        name=name,
        runtime_image=options.server_image or RUNTIME_IMAGE,
        runtime_version=None if options.server_image else RUNTIME_VERSION,
        shared_memory=_gibibytes(resources.shared_memory_bytes),
    )


def _inference_service(image: ServedImage, name: str, resources: Resources, options: Options) -> str:
    return render(
        "kserve/inference-service.yaml",
        **_served(image, name, resources, options),
        arguments=server_arguments(name, resources),
        ephemeral_storage=_gibibytes(image.size_bytes) if options.storage_scheme == "oci+fetch" else None,
    )


def _llm_service(image: ServedImage, name: str, resources: Resources, options: Options) -> str:
    arguments = ["--dtype=bfloat16", *engine_arguments(resources)]
    return render("kserve/llm-inference-service.yaml", **_served(image, name, resources, options), arguments=arguments)


def _prepull(image: ServedImage, name: str, resources: Resources, options: Options) -> str:
    served = _served(image, name, resources, options)
    return render(
        "kserve/prepull.yaml", **{**served, "labelled_only": True}, reference=image.reference, pause_image=PAUSE_IMAGE
    )


def _smoke(image: ServedImage, name: str) -> str:
    path, body = request(image, name)
    marker = "'\"content\"'" if image.answers_chat else "'\"text\"'"
    return render(
        "kserve/smoke.yaml",
        name=name,
        curl_image=CURL_IMAGE,
        path=path,
        body=body,
        marker=marker,
        tries=SMOKE_TRIES,
    )


def _served(image: ServedImage, name: str, resources: Resources, options: Options) -> dict[str, Any]:
    """Return what the manifests of a served model have in common."""
    return {
        "about": ["Written by gemma-pack deploy.", *image.describe()],
        "arithmetic": resources.explain(),
        "node_disk": format_bytes(resources.node_disk_bytes),
        "name": name,
        "pull_secret": options.pull_secret,
        "storage_uri": f"{options.storage_scheme or STORAGE_SCHEMES[0]}://{image.reference}",
        "cpu_request": resources.cpu_request,
        "cpu_limit": resources.cpu_limit,
        "memory_request": _gibibytes(resources.memory_request_bytes),
        "memory_limit": _gibibytes(resources.memory_limit_bytes),
        "gpus": resources.gpus,
        "labelled_only": False,
        "gpu_memory_mib": math.ceil(resources.gpu_memory_bytes / (1 << 20)),
    }


def _steps(image: ServedImage, name: str, options: Options) -> tuple[str, ...]:
    auth_file = "pull-secret.json"
    create = f"kubectl create secret generic {options.pull_secret} --type=kubernetes.io/dockerconfigjson"
    secret = (
        f"podman login --authfile {auth_file} {image.host}",
        f"{create} --from-file=.dockerconfigjson={auth_file}",
    )
    return (
        *(secret if options.pull_secret else ()),
        f"kubectl apply -f {options.file('prepull.yaml')}  # if the nodes shall pull the weights beforehand",
        f"kubectl apply -k {shlex.quote(str(options.directory))}",
        f"kubectl wait --for=condition=Ready inferenceservice/{name} --timeout=30m",
        f"kubectl replace --force -f {options.file('smoke.yaml')}  # if a Job shall ask instead of you",
        f"kubectl port-forward deployment/{name}-predictor 8080:8080",
        curl_command(image, name, "http://127.0.0.1:8080"),
    )


def _warnings(image: ServedImage, options: Options) -> tuple[str, ...]:
    if options.server_image is None or "@sha256:" in options.server_image:
        return provenance_warnings(image)
    loose = f"{options.server_image} is not pinned by digest: two pods may run two versions of the server"
    return (*provenance_warnings(image), loose)


def _auth_key(host: str) -> str:
    """Return the registry's key in a docker config; Docker Hub's is older than its host name."""
    return "https://index.docker.io/v1/" if host == "docker.io" else host


def _gibibytes(size_bytes: int) -> str:
    """Return a Kubernetes quantity that holds `size_bytes`."""
    return f"{math.ceil(size_bytes / GIB)}Gi"
