"""Is an image whole: every manifest below what a name stands for, and every blob that they name, at its size.

A manifest is read back and compared with its digest. Of a blob the registry is asked for its size; with `full`, it is
read from end to end and hashed, several at a time, and one that breaks off is gone on with.
"""

from __future__ import annotations

import hashlib
import time
from functools import partial
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from gemma_pack.errors import RegistryError
from gemma_pack.oci.arrival import PUT_AGAIN
from gemma_pack.oci.manifest import INDEX_TYPES, MANIFEST_TYPES, Index, Manifest
from gemma_pack.oci.retry import Retry
from gemma_pack.oci.source import iter_blob, open_source
from gemma_pack.oci.transfer import in_parallel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.oci.manifest import Descriptor
    from gemma_pack.oci.reference import Reference
    from gemma_pack.oci.source import ImageSource


class Verification(BaseModel):
    """What was asked for, and what is wrong."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    """Of the index or manifest that the name stands for."""
    manifests: int
    blobs: int
    """Configurations and layers of all platforms, each once."""
    size_bytes: int
    hashed_bytes: int
    """0 where only sizes were asked for."""
    problems: tuple[str, ...]
    seconds: float

    def require_whole(self) -> None:
        """Raise RegistryError where something is wrong."""
        if self.problems:
            more = f", and {len(self.problems) - 1} more" if len(self.problems) > 1 else ""
            raise RegistryError(f"{self.name} is not whole: {self.problems[0]}{more}", hint=PUT_AGAIN)


def verify(
    image: Path | Reference | str,
    *,
    full: bool = False,
    plain_http: bool = False,
    ca_file: Path | None = None,
    retry: Retry | None = None,
    reporter: Reporter,
) -> Verification:
    """Check that an image is whole, for all its platforms.

    Args:
        image: a reference, or the path of an OCI layout.
        full: hash every blob, too.
        plain_http: speak HTTP without TLS to a registry that is not on this machine.
        ca_file: certificates to trust besides the system's.
        retry: patience with the registry.
        reporter: hears of progress.

    Raises:
        InvalidUsageError: `image` is neither.
        RegistryError: there is no such image, or one of its manifests is missing or damaged.
        AccessError: the registry wants a login, or another one.
        OfflineError: the registry cannot be reached.
    """
    begin_s = time.monotonic()
    retry = (retry or Retry()).telling(reporter.status)
    with open_source(image, plain_http=plain_http, ca_file=ca_file, retry=retry) as source:
        root, manifests = _manifests(source)
        blobs = {blob.digest: blob for one in manifests for blob in (one.config, *one.layers)}
        ordered = sorted(blobs.values(), key=lambda blob: -blob.size_bytes)
        total = sum(blob.size_bytes for blob in ordered)
        with reporter.progress(
            f"verifying {source.name}", total if full else len(ordered), "bytes" if full else "steps"
        ) as task:
            check = partial(_hashed, source, task.advance) if full else partial(_sized, source, task.advance)
            found = in_parallel([partial(check, blob) for blob in ordered], source.patience.stop)
    problems = tuple(problem for problem in found if problem)
    return Verification(
        name=source.name,
        digest=root.digest,
        manifests=len(manifests),
        blobs=len(ordered),
        size_bytes=total,
        hashed_bytes=total if full and not problems else 0,
        problems=problems,
        seconds=round(time.monotonic() - begin_s, 3),
    )


def _manifests(source: ImageSource) -> tuple[Descriptor, list[Manifest]]:
    """Return what the name stands for, and every manifest below it, read and checked."""
    root = source.root()
    if root.descriptor.media_type in MANIFEST_TYPES:
        return root.descriptor, [Manifest.parse(root.data, origin=source.name)]
    if root.descriptor.media_type not in INDEX_TYPES:
        raise RegistryError(f"{source.name} is {root.descriptor.media_type or 'of no type'}, not an image")
    children = Index.parse(root.data, origin=source.name).manifests
    return root.descriptor, [Manifest.parse(source.document(one).data, origin=one.digest) for one in children]


def _sized(source: ImageSource, advance: Callable[[float], None], blob: Descriptor) -> str | None:
    size = source.blob_size(blob.digest)
    advance(1)
    return None if size == blob.size_bytes else _problem(blob, size)


def _hashed(source: ImageSource, advance: Callable[[float], None], blob: Descriptor) -> str | None:
    """Read a blob to its end and compare its digest."""
    size = source.blob_size(blob.digest)
    if size != blob.size_bytes:
        return _problem(blob, size)
    state = hashlib.sha256()
    for piece in iter_blob(source, blob):
        state.update(piece)
        advance(len(piece))
    return None if state.hexdigest() == blob.hex else f"the bytes of {_named(blob)} have another digest"


def _problem(blob: Descriptor, size_bytes: int | None) -> str:
    if size_bytes is None:
        return f"{_named(blob)} is missing"
    return f"{_named(blob)} has {size_bytes} bytes, not {blob.size_bytes}"


def _named(blob: Descriptor) -> str:
    return f"{blob.title[:100]} ({blob.digest})" if blob.title else blob.digest
