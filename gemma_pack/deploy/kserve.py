"""KServe, and so OpenShift AI: a ServingRuntime and an InferenceService, with a pull secret on request.

Sources: the CRDs serving.kserve.io/v1alpha1 and v1beta1; pkg/utils/storage.go of KServe for the `oci` schemes and for
what they need of an image; config/runtimes/kserve-vllmserver.yaml for the container that KServe itself runs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gemma_pack.console import format_bytes
from gemma_pack.deploy.bundle import Bundle, BundleFile
from gemma_pack.deploy.image import MAX_NAME_LENGTH
from gemma_pack.deploy.resources import GIB
from gemma_pack.deploy.server import curl_command, server_arguments
from gemma_pack.deploy.templating import render
from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.deploy.image import ServedImage
    from gemma_pack.deploy.resources import Resources

RUNTIME_VERSION: Final = "v0.30.0"
RUNTIME_IMAGE: Final = (
    "docker.io/vllm/vllm-openai@sha256:8a69ffad015f138d7170c4ddc429e230a3bc1c1719f67e14324749df200a4b90"
)
"""The project's own server image at RUNTIME_VERSION, pinned: its index of all platforms."""
STORAGE_SCHEMES: Final = ("oci", "oci+modelcar", "oci+native", "oci+fetch")
"""`oci` leaves the way to the cluster; the others choose it: a sidecar that links the files, a volume of the container
runtime, or a copy into the pod (KServe, `ParseOciScheme`)."""

_LABEL: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN: Final = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_IMAGE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class KServeOptions:
    """What the user may choose.

    Attributes:
        name: of both objects, and of the model for clients; None for one made from the repository.
        runtime_image: the server's image.
        storage_scheme: one of STORAGE_SCHEMES.
        pull_secret: name of the Secret that opens the registry; None where the registry is open to the cluster.
    """

    name: str | None = None
    runtime_image: str = RUNTIME_IMAGE
    storage_scheme: str = STORAGE_SCHEMES[0]
    pull_secret: str | None = None

    def __post_init__(self) -> None:
        """Refuse names that the API server would refuse."""
        if self.name is not None and not (_LABEL.fullmatch(self.name) and len(self.name) <= MAX_NAME_LENGTH):
            raise InvalidUsageError(
                f"{self.name!r} is no name for an InferenceService: a letter, then letters, digits and '-', "
                f"all small, at most {MAX_NAME_LENGTH}",
                hint="choose another --name",
            )
        if self.pull_secret is not None and not (
            _SUBDOMAIN.fullmatch(self.pull_secret) and len(self.pull_secret) <= 253
        ):
            raise InvalidUsageError(
                f"{self.pull_secret!r} is no name for a Secret: small letters, digits, '-' and '.'",
                hint="choose another --pull-secret",
            )
        if not _IMAGE.fullmatch(self.runtime_image):
            raise InvalidUsageError(f"{self.runtime_image!r} is no image's name", hint="choose another --runtime-image")


def kserve_bundle(
    image: ServedImage, resources: Resources, options: KServeOptions, directory: Path | None = None
) -> Bundle:
    """Return the manifests that serve `image`.

    Args:
        image: what to serve.
        resources: what one replica needs.
        options: the user's choices.
        directory: where the files will be, for the printed commands; None when they go to stdout.
    """
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
    kustomization = render("kserve/kustomization.yaml", resources=[file.name for file in files])
    forms.append(BundleFile(name="kustomization.yaml", text=kustomization, printed=False))
    return Bundle(
        target="kserve",
        files=(*files, *forms),
        separator="---\n",
        steps=_steps(image, name, options, directory),
        warnings=_warnings(image, options),
    )


def _serving_runtime(name: str, resources: Resources, options: KServeOptions) -> str:
    return render(
        "kserve/serving-runtime.yaml",
        about=["Written by gemma-pack deploy: vLLM as Gemma needs it."],
        name=name,
        runtime_image=options.runtime_image,
        runtime_version=RUNTIME_VERSION if options.runtime_image == RUNTIME_IMAGE else None,
        shared_memory=_gibibytes(resources.shared_memory_bytes),
    )


def _inference_service(image: ServedImage, name: str, resources: Resources, options: KServeOptions) -> str:
    copies = options.storage_scheme == "oci+fetch"
    return render(
        "kserve/inference-service.yaml",
        about=["Written by gemma-pack deploy.", *image.describe()],
        arithmetic=resources.explain(),
        node_disk=format_bytes(resources.node_disk_bytes),
        name=name,
        pull_secret=options.pull_secret,
        storage_uri=f"{options.storage_scheme}://{image.reference}",
        arguments=server_arguments(name, resources),
        cpu_request=resources.cpu_request,
        cpu_limit=resources.cpu_limit,
        memory_request=_gibibytes(resources.memory_request_bytes),
        memory_limit=_gibibytes(resources.memory_limit_bytes),
        ephemeral_storage=_gibibytes(image.size_bytes) if copies else None,
        gpus=resources.gpus,
        gpu_memory_mib=math.ceil(resources.gpu_memory_bytes / (1 << 20)),
    )


def _steps(image: ServedImage, name: str, options: KServeOptions, directory: Path | None) -> tuple[str, ...]:
    auth_file = "pull-secret.json"
    create = f"kubectl create secret generic {options.pull_secret} --type=kubernetes.io/dockerconfigjson"
    secret = (
        f"podman login --authfile {auth_file} {image.host}",
        f"{create} --from-file=.dockerconfigjson={auth_file}",
    )
    apply = f"kubectl apply -k {directory}" if directory else "kubectl apply -f -  # with the manifests above"
    return (
        *(secret if options.pull_secret else ()),
        apply,
        f"kubectl wait --for=condition=Ready inferenceservice/{name} --timeout=30m",
        f"kubectl port-forward deployment/{name}-predictor 8080:8080",
        curl_command(image, name, "http://127.0.0.1:8080"),
    )


def _warnings(image: ServedImage, options: KServeOptions) -> tuple[str, ...]:
    warnings = []
    validation = image.record.validation if image.record else None
    if validation is None:
        warnings.append("nothing in the image says that the variant was validated against its base")
    elif validation.verdict != "pass":
        warnings.append(f"the validation of this variant ended with: {validation.verdict}")
    if "@sha256:" not in options.runtime_image:
        warnings.append(f"{options.runtime_image} is not pinned by digest: two pods may run two versions of the server")
    return tuple(warnings)


def _auth_key(host: str) -> str:
    """Return the registry's key in a docker config; Docker Hub's is older than its host name."""
    return "https://index.docker.io/v1/" if host == "docker.io" else host


def _gibibytes(size_bytes: int) -> str:
    """Return a Kubernetes quantity that holds `size_bytes`."""
    return f"{math.ceil(size_bytes / GIB)}Gi"
