"""What a target gives its user: files, and the commands that come next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma_pack.deploy.image import ServedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleFile:
    """One file.

    Attributes:
        name: inside the bundle's directory.
        text: its content, ending with a newline.
        printed: whether it is part of what goes to stdout; a file that only makes sense on disk is not.
    """

    name: str
    text: str
    printed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """All that one target writes.

    Attributes:
        target: its name on the command line.
        files: what to apply, start or copy.
        steps: the commands that bring it to life, in order.
        warnings: what the user should know before.
    """

    target: str
    files: tuple[BundleFile, ...]
    steps: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The printed files: YAML as one stream for `kubectl apply`, anything else under its name."""
        printed = [file for file in self.files if file.printed]
        if all(file.name.endswith(".yaml") for file in printed):
            return "---\n".join(file.text for file in printed)
        return "\n".join(f"# {file.name}\n{file.text}" for file in printed)


def provenance_warnings(image: ServedImage) -> tuple[str, ...]:
    """Return what is wrong with serving this image, whatever the target: nothing, if it passed its validation."""
    if image.verdict is None:
        return ("nothing in the image says that the variant was validated against its base",)
    if image.verdict != "pass":
        return (f"the validation of this variant ended with: {image.verdict}",)
    return ()


def is_gemma_4(image: ServedImage) -> bool:
    """Whether the image takes vLLM 0.19 or later, which Gemma 4 came with."""
    return str(image.config.get("model_type")).startswith("gemma4")
