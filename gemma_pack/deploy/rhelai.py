"""RHEL AI: ilab serves the variant with its vLLM and chats with it.

It downloads only artifacts of raw files, by a tag, from a registry without a port; anything else `gemma-pack pull`
fetches, into the directory where ilab keeps its models.

Sources: instructlab, src/instructlab/model/download.py (`OCIDownloader`: a repository with a port is refused, the tag
goes into --release, the files land below the last part of the repository), src/instructlab/defaults.py (directories),
src/instructlab/cli/model/serve.py (what follows `--` goes to vLLM).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gemma_pack.deploy.bundle import Bundle, BundleFile, is_gemma_4, provenance_warnings
from gemma_pack.deploy.server import curl_command, engine_arguments
from gemma_pack.deploy.templating import render

if TYPE_CHECKING:
    from gemma_pack.deploy.image import ServedImage
    from gemma_pack.deploy.options import Options
    from gemma_pack.deploy.resources import Resources


_TOO_OLD: Final = "Gemma 4 takes vLLM 0.19, and ilab's was older when it was last released: choose --target rhaiis"


def rhelai_bundle(image: ServedImage, resources: Resources, options: Options) -> Bundle:
    """Return the script that serves `image` with ilab."""
    options.refuse_for("rhelai", "name", "server_image", "storage_scheme", "pull_secret")
    repository, _, digest = image.reference.partition("@")
    obstacle = _obstacle(image)
    model = repository.rsplit("/", 1)[1]  # where ilab itself puts an artifact, whose digest the script compares
    if obstacle:
        model += f"-{image.short_digest}"
    serve = render(
        "rhelai/serve.sh",
        about=image.describe(),
        arithmetic=resources.explain(),
        model=model,
        obstacle=obstacle,
        reference=image.reference,
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
        steps=(
            f"sh {options.file('serve.sh')}",
            chat if image.answers_chat else curl_command(image, model, "http://127.0.0.1:8000"),
        ),
        warnings=(*provenance_warnings(image), *((_TOO_OLD,) if is_gemma_4(image) else ())),
    )


def _obstacle(image: ServedImage) -> str | None:
    """Return why `ilab model download` cannot fetch the image, a clause; None where it can."""
    if not image.is_artifact:
        return "ilab downloads raw files, and this is a modelcar"
    if image.tag is None:
        return "ilab downloads by tag, and this was written for a digest"
    if ":" in image.host:
        return f"ilab takes {image.host} for a tag: it knows no registry with a port"
    return None
