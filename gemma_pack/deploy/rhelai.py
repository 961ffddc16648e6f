"""RHEL AI: ilab downloads the artifact of raw files, serves it with its vLLM and chats with it.

Sources: instructlab, src/instructlab/model/download.py (`OCIDownloader`: a repository with a port is refused, the tag
goes into --release, the files land below the last part of the repository), src/instructlab/defaults.py (directories),
src/instructlab/cli/model/serve.py (what follows `--` goes to vLLM).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_pack.deploy.bundle import Bundle, BundleFile, provenance_warnings
from gemma_pack.deploy.server import curl_command, engine_arguments
from gemma_pack.deploy.templating import render
from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from gemma_pack.deploy.image import ServedImage
    from gemma_pack.deploy.options import Options
    from gemma_pack.deploy.resources import Resources


def rhelai_bundle(image: ServedImage, resources: Resources, options: Options) -> Bundle:
    """Return the script that serves the artifact `image` with ilab.

    Raises:
        InvalidUsageError: ilab cannot download it: it is a modelcar, has no tag, or its registry has a port.
    """
    options.refuse_for("rhelai", "name", "server_image", "storage_scheme", "pull_secret")
    repository, _, digest = image.reference.partition("@")
    if not image.is_artifact:
        raise InvalidUsageError(
            "ilab downloads raw files, and this is a modelcar image",
            hint="gemma-pack package DIR --layout artifact, push that under a tag of its own, and deploy the tag",
        )
    if image.tag is None:
        raise InvalidUsageError("ilab downloads by tag, and the reference has none", hint="add the tag: host/name:tag")
    if ":" in image.host:
        raise InvalidUsageError(
            f"ilab takes {image.host} for a tag: it knows no registry with a port",
            hint="push the artifact to a registry on port 443",
        )
    model = repository.rsplit("/", 1)[1]
    serve = render(
        "rhelai/serve.sh",
        about=image.describe(),
        arithmetic=resources.explain(),
        model=model,
        repository=f"docker://{repository}",
        tag=image.tag,
        digest=digest,
        gpus=resources.gpus,
        arguments=["--dtype=bfloat16", *engine_arguments(resources)],
    )
    chat = f'ilab model chat --model "${{XDG_CACHE_HOME:-$HOME/.cache}}/instructlab/models/{model}"'
    return Bundle(
        target="rhelai",
        files=(BundleFile(name="serve.sh", text=serve),),
        steps=("sh serve.sh", chat if image.answers_chat else curl_command(image, model, "http://127.0.0.1:8000")),
        warnings=provenance_warnings(image),
    )
