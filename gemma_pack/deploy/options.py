"""What the user may choose about a deployment."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gemma_pack.errors import InvalidUsageError

MAX_NAME_LENGTH: Final = 40
"""KServe joins name, `-predictor-` and namespace to a DNS label of at most 63 characters: 12 are left for the last."""
STORAGE_SCHEMES: Final = ("oci", "oci+modelcar", "oci+native", "oci+fetch")
"""`oci` leaves the way to the cluster; the others choose it: a sidecar that links the files, a volume of the container
runtime, or a copy into the pod (KServe, `ParseOciScheme`)."""
DIRECTORY: Final = Path("serving")
"""Where the files go unless told."""

_LABEL: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN: Final = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_IMAGE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user may choose; None leaves it to the target.

    Attributes:
        name: of the service and the model; None for one from the repository.
        server_image: the server's image, where the target runs one.
        storage_scheme: one of STORAGE_SCHEMES, how KServe gets at the files.
        pull_secret: name of the Secret with the registry's login; None where the cluster needs none.
        directory: where the files will be, for the commands that follow.
    """

    name: str | None = None
    server_image: str | None = None
    storage_scheme: str | None = None
    pull_secret: str | None = None
    directory: Path = DIRECTORY

    def __post_init__(self) -> None:
        """Refuse names that a server would refuse."""
        if self.name is not None and not (_LABEL.fullmatch(self.name) and len(self.name) <= MAX_NAME_LENGTH):
            raise InvalidUsageError(
                f"{self.name!r} is no name for a service: a letter, then letters, digits and '-', all small, "
                f"at most {MAX_NAME_LENGTH}",
                hint="choose another --name",
            )
        if self.pull_secret is not None and not _SUBDOMAIN.fullmatch(self.pull_secret):
            raise InvalidUsageError(
                f"{self.pull_secret!r} is no name for a Secret: small letters, digits, '-' and '.'",
                hint="choose another --pull-secret",
            )
        if self.server_image is not None and not _IMAGE.fullmatch(self.server_image):
            raise InvalidUsageError(f"{self.server_image!r} is no image's name", hint="choose another --server-image")

    def file(self, name: str) -> str:
        """Return the path of one of the files as a word for a shell."""
        return shlex.quote(str(self.directory / name))

    def refuse_for(self, target: str, *names: str) -> None:
        """Raise InvalidUsageError if one of the options `names` is set, which `target` has no use for."""
        for name in names:
            if getattr(self, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise InvalidUsageError(f"--target {target} has no use for {option}", hint="leave it out")
