"""What a target gives its user: files, and the commands that come next."""

from __future__ import annotations

from dataclasses import dataclass


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
        separator: between the files on stdout.
        steps: the commands that bring it to life, in order.
        warnings: what the user should know before.
    """

    target: str
    files: tuple[BundleFile, ...]
    separator: str
    steps: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The printed files, one after another."""
        return self.separator.join(file.text for file in self.files if file.printed)
