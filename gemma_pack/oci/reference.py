"""Names of images in registries: `host[:port]/name[:tag][@sha256:…]`.

The grammar is the reference implementation's, written out below; the short forms that people type for Docker Hub
are expanded the way docker does it, so that a name means the same image to every tool.

Source: https://github.com/distribution/reference (reference.go, regexp.go, normalize.go).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from typing import Final

from gemma_pack.errors import InvalidUsageError

MAX_NAME_LENGTH: Final = 255
"""Of host and repository together (`NameTotalLengthMax` in reference.go)."""
MAX_LABEL_LENGTH: Final = 63
"""Of a part of a host's name (RFC 1035, 2.3.4)."""
DEFAULT_TAG: Final = "latest"
_HUB: Final = "docker.io"
_HUB_API: Final = "registry-1.docker.io"

_LABEL: Final = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST: Final = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_COMPONENT: Final = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_HINT: Final = "write host[:port]/name[:tag], such as quay.io/team/gemma-3-270m-w4a16:1.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """An image in a registry. `host` and `repository` are complete, tag and digest as given."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"

    @property
    def target(self) -> str:
        """What to ask a registry for: the digest, else the tag, else `latest`."""
        return self.digest or self.tag or DEFAULT_TAG

    @property
    def api_host(self) -> str:
        """The host, with its port, that speaks the registry protocol."""
        return _HUB_API if self.host == _HUB else self.host

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is on this machine, so that plain HTTP crosses no network."""
        return is_loopback(host_name(self.host))

    def pinned(self, digest: str) -> Reference:
        """Return the reference of exactly this image, without a tag that may move."""
        return replace(self, tag=None, digest=digest)


def parse_reference(text: str) -> Reference:
    """Read an image's name.

    Raises:
        InvalidUsageError: it does not follow the grammar; the message says which part.
    """
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidUsageError(f"{text!r}: {digest!r} is not sha256: and 64 hex digits", hint=_HINT)
    if "://" in rest:
        raise InvalidUsageError(f"{text!r} is a URL, not an image's name", hint=_HINT)
    name, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:  # that colon stands before a port
        name, colon, tag = rest, "", ""
    if colon and not _TAG.fullmatch(tag):
        raise InvalidUsageError(
            f"{text!r}: {tag!r} is not a tag: letters, digits, '_', '.', '-', at most 128", hint=_HINT
        )
    host, repository = _split_host(name)
    if not re.fullmatch(_HOST, host) or not _has_sound_labels(host):
        raise InvalidUsageError(f"{text!r}: {host!r} is not a host", hint=_HINT)
    if not _REPOSITORY.fullmatch(repository):
        raise InvalidUsageError(
            f"{text!r}: {repository!r} is not a repository: lower-case letters, digits, and '.', '_', '-' between them",
            hint=_HINT,
        )
    if len(host) + 1 + len(repository) > MAX_NAME_LENGTH:
        raise InvalidUsageError(f"{text!r} is longer than {MAX_NAME_LENGTH} characters", hint=_HINT)
    return Reference(host=host, repository=repository, tag=tag or None, digest=digest or None)


def repository_on(host: str, text: str) -> str:
    """Return the repository that `text`, with or without `host` before it, names on `host`.

    Raises:
        InvalidUsageError: it is no repository, or is on another registry.
    """
    first, slash, rest = text.partition("/")
    is_host = bool(slash) and (first in {host, "localhost"} or any(c in first for c in ".:["))
    repository = rest if is_host else text
    if (is_host and first != host) or not _REPOSITORY.fullmatch(repository):
        raise InvalidUsageError(
            f"{text!r} is not a repository of {host}", hint=f"write {host}/team/name, without a tag"
        )
    return repository


def is_tag(text: str) -> bool:
    """Tell whether `text` follows the grammar of tags."""
    return _TAG.fullmatch(text) is not None


def host_name(host: str) -> str:
    """Return `host` without its port and without the brackets of an IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(name: str) -> bool:
    """Tell whether a host name or address, without port, is this machine: localhost, 127.0.0.0/8 or ::1."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _has_sound_labels(host: str) -> bool:
    """Tell whether a host can stand in a URL: an IPv6 address that is one, or labels as DNS and IDNA have them."""
    name = host_name(host)
    try:
        if host.startswith("["):
            return ipaddress.ip_address(name).version == 6
        if "xn--" in name.lower():
            import idna  # here, because few names need it

            idna.decode(name)
    except ValueError:  # idna's errors are such
        return False
    return all(len(label) <= MAX_LABEL_LENGTH for label in name.split("."))


def _split_host(name: str) -> tuple[str, str]:
    """Tell a host from the first part of a Docker Hub name by what only a host can have: a dot, a port, capitals."""
    first, slash, rest = name.partition("/")
    is_host = slash and (first == "localhost" or any(c in first for c in ".:[") or first != first.lower())
    if not is_host:
        return _HUB, name if slash else f"library/{name}"
    if first in {"docker.io", "index.docker.io"}:
        return _HUB, rest if "/" in rest else f"library/{rest}"
    return first, rest
