"""Pushing: an image goes from a layout, or straight from a checkpoint's directory, into a registry.

Blobs first, then the manifests, each asked for again, then the tag: it never names an image that is not whole. Then the
registry is asked for everything once more. The same command after an interruption, or `kill -9`, sends what is still
missing; `journal` says what it goes by. A checkpoint's files are read once, hashed while they are sent, and copied
nowhere.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import CheckpointError, InvalidUsageError, RegistryError
from gemma_pack.oci.base import DEFAULT_BASE, BaseChoice
from gemma_pack.oci.body import Blob
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.image import plan_image
from gemma_pack.oci.journal import PushJournal, fingerprint
from gemma_pack.oci.layers import read_file
from gemma_pack.oci.layout import Layout, hash_stream
from gemma_pack.oci.manifest import IMAGE_CONFIG_TYPES, INDEX_TYPES, MANIFEST_TYPES, Descriptor, Document
from gemma_pack.oci.reference import Reference, parse_reference, repository_on
from gemma_pack.oci.retry import AnswerError, Retry
from gemma_pack.oci.siblings import Siblings
from gemma_pack.oci.source import is_layout
from gemma_pack.oci.transfer import in_parallel
from gemma_pack.oci.upload import Outcome, Uploader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.oci.image import ImagePlan
    from gemma_pack.oci.layers import LayerSource

    Job = Callable[[Uploader, Siblings], tuple[Descriptor, Outcome]]
    """Brings one blob through an uploader, beside the images that are there."""


class PushResult(BaseModel):
    """An image in a registry, asked for again after it was pushed."""

    model_config = ConfigDict(frozen=True)

    reference: str
    """As it was given, with its tag."""
    digest: str
    pinned: str
    """`host/name@digest`: what to deploy."""
    size_bytes: int
    """Of all blobs: uploaded, found in the repository, and mounted from another one."""
    uploaded_bytes: int
    existed_bytes: int
    mounted_bytes: int
    shared_bytes: int
    """Of those that were not uploaded: what the image `shared_with` has, too."""
    shared_with: str | None
    """The tag, of this repository unless it names another one, that has the most bytes in common with this image."""
    is_artifact: bool
    """Whether it is files as they are, which no container runtime mounts."""
    seconds: float


def push(
    source: Path,
    reference: Reference | str,
    *,
    mount_from: Sequence[str] = (),
    base: BaseChoice = DEFAULT_BASE,
    plain_http: bool = False,
    ca_file: Path | None = None,
    retry: Retry | None = None,
    reporter: Reporter,
) -> PushResult:
    """Push the image in the layout `source`, or that of the checkpoint in the directory `source`.

    Args:
        source: an OCI layout that holds one image, or a checkpoint, which is packed while it is sent.
        reference: where to; without a tag, `latest`.
        base: what lies under a checkpoint's weights; a layout has its own.
        mount_from: repositories of the same registry whose blobs may be reused.
        plain_http: speak HTTP without TLS to a registry that is not on this machine.
        ca_file: certificates to trust besides the system's.
        retry: patience with the registry.
        reporter: hears of progress.

    Raises:
        InvalidUsageError: `source` is neither, or the reference names another digest than the image's.
        RegistryError: the registry refused something, or does not have what was sent.
        AccessError: the registry wants a login, or another one.
        OfflineError: the registry cannot be reached.
    """
    reference = parse_reference(reference) if isinstance(reference, str) else reference
    if is_layout(source) and not base.is_default:
        raise InvalidUsageError(
            f"{source} has its base already", hint="leave out --base and --platform, or push the checkpoint"
        )
    begin_s = time.monotonic()
    retry = (retry or Retry()).telling(reporter.status)
    repositories = [repository_on(reference.host, text) for text in mount_from]
    upload = _from_layout(Layout.open(source), reference) if is_layout(source) else _from_plan(_plan(source, base))
    with ExitStack() as stack:
        connect = partial(RegistryClient, plain_http=plain_http, ca_file=ca_file, retry=retry)
        client = stack.enter_context(connect(reference, writable=True))
        client.ping()
        others = [stack.enter_context(connect(replace(reference, repository=name))) for name in repositories]
        siblings = Siblings.find([client, *others], reference.tag or reference.target)
        journal = stack.enter_context(PushJournal.beside(source, f"{reference.host}/{reference.repository}"))
        with reporter.progress(f"pushing to {reference.host}", upload.size_bytes, "bytes") as task:
            uploader = Uploader(client, mount_from=repositories, journal=journal, advance=task.advance)
            moved = in_parallel([partial(job, uploader, siblings) for job in upload.jobs], client.patience.stop)
            documents = upload.documents([descriptor.digest for descriptor, _ in moved])
            moved += [_bring_document(uploader, document) for document in documents if not _is_manifest(document)]
        digest = _tag(client, [document for document in documents if _is_manifest(document)])
        reporter.status("asking the registry for every part again")
        _verify(client, digest, [descriptor for descriptor, _ in moved])
    totals = dict.fromkeys(("uploaded", "existed", "mounted"), 0)
    for descriptor, outcome in moved:
        totals[outcome] += descriptor.size_bytes
    there = [descriptor.digest for descriptor, outcome in moved if outcome != "uploaded"]
    shared_with, shared_bytes = siblings.most_shared(there)
    return PushResult(
        reference=str(reference),
        digest=digest,
        pinned=str(reference.pinned(digest)),
        size_bytes=sum(totals.values()),
        uploaded_bytes=totals["uploaded"],
        existed_bytes=totals["existed"],
        mounted_bytes=totals["mounted"],
        shared_bytes=shared_bytes,
        shared_with=shared_with or None,
        is_artifact=upload.is_artifact,
        seconds=round(time.monotonic() - begin_s, 3),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image:
    """What to push: jobs for the large blobs, largest first, and the documents once the digests are known."""

    size_bytes: int
    jobs: Sequence[Job]
    documents: Callable[[Sequence[str]], Sequence[Document]]
    """From the digests in the order of `jobs` to configs, manifests and, last, the root."""
    is_artifact: bool = False


def _plan(directory: Path, base: BaseChoice) -> ImagePlan:
    if not (directory / "config.json").is_file():
        raise InvalidUsageError(
            f"{directory} is neither an OCI layout nor a checkpoint", hint="gemma-pack package DIR makes a layout"
        )
    return plan_image(Checkpoint.open(directory), base)


def _from_layout(layout: Layout, reference: Reference) -> _Image:
    _require_named(reference, layout.root)  # before the first byte
    manifests = layout.manifests()
    blobs = {blob.digest: blob for _, manifest in manifests for blob in (manifest.config, *manifest.layers)}
    paths = {blob.digest: layout.require_blob(blob) for blob in blobs.values()}
    ordered = sorted(blobs.values(), key=lambda blob: -blob.size_bytes)
    descriptors = list({descriptor.digest: descriptor for descriptor, _ in manifests}.values())
    if layout.root.digest not in {descriptor.digest for descriptor in descriptors}:
        descriptors.append(layout.root)
    documents = [Document(descriptor=descriptor, data=layout.read_blob(descriptor)) for descriptor in descriptors]
    return _Image(
        size_bytes=sum(blob.size_bytes for blob in ordered),
        jobs=[_file_job(blob, paths[blob.digest]) for blob in ordered],
        documents=lambda _: documents,
        is_artifact=all(manifest.config.media_type not in IMAGE_CONFIG_TYPES for _, manifest in manifests),
    )


def _from_plan(plan: ImagePlan) -> _Image:
    ordered = sorted(range(len(plan.layers)), key=lambda number: -plan.layers[number].size_bytes)

    def documents(digests: Sequence[str]) -> Sequence[Document]:
        by_number = dict(zip(ordered, digests[: len(ordered)], strict=True))
        return plan.assemble([by_number[number] for number in range(len(plan.layers))]).documents

    return _Image(
        size_bytes=plan.size_bytes,
        jobs=[
            *(_layer_job(plan.layers[number]) for number in ordered),
            *(_file_job(blob.descriptor, blob.path) for blob in plan.base_layers),
        ],
        documents=documents,
    )


def _file_job(descriptor: Descriptor, path: Path) -> Job:
    blob = Blob(
        size_bytes=descriptor.size_bytes,
        digest=descriptor.digest,
        read=lambda: read_file(path, descriptor.size_bytes),
        label=str(path),
        key=descriptor.digest,
    )
    return lambda uploader, _: (descriptor, uploader.bring(blob))


def _layer_job(layer: LayerSource) -> Job:
    """Bring a layer of a checkpoint: by its digest where that is known or worth knowing first, else at once."""

    def bring(uploader: Uploader, siblings: Siblings) -> tuple[Descriptor, Outcome]:
        outcome: Outcome = "uploaded"
        files = fingerprint(layer)
        digest = uploader.journal.digest(files)
        if digest is None and siblings.may_hold(layer):
            digest = hash_stream(uploader.until_stopped(layer.iter_chunks()))
            uploader.journal.keep_digest(files, digest)
        blob = Blob(size_bytes=layer.size_bytes, digest=digest, read=layer.iter_chunks, label=layer.title, key=files)
        if digest:
            outcome = uploader.bring(blob)
        else:
            digest = uploader.stream(blob)
        if fingerprint(layer) != files:
            raise CheckpointError(
                f"{layer.title} changed while it was sent",
                hint="run the command again when nothing writes to the directory",
            )
        return Descriptor(media_type=layer.media_type, digest=digest, size_bytes=layer.size_bytes), outcome

    return bring


def _bring_document(uploader: Uploader, document: Document) -> tuple[Descriptor, Outcome]:
    descriptor = document.descriptor
    blob = Blob(
        size_bytes=descriptor.size_bytes,
        digest=descriptor.digest,
        read=lambda: iter([document.data]),
        label="config",
        key=descriptor.digest,
    )
    return descriptor, uploader.bring(blob)


def _is_manifest(document: Document) -> bool:
    return document.descriptor.media_type in MANIFEST_TYPES | INDEX_TYPES


def _tag(client: RegistryClient, manifests: Sequence[Document]) -> str:
    """Store the manifests, the root last, then name the root by the tag where it is not; return the root's digest."""
    root = manifests[-1].descriptor
    reference = client.reference
    _require_named(reference, root)
    for manifest in manifests:
        _store(client, manifest)
    target = reference.tag or reference.target
    if target == root.digest:
        return root.digest
    try:
        return client.put_manifest(target, manifests[-1].data, root.media_type)
    except AnswerError as error:  # where tags are fixed (Harbor, ECR), even the same image under its own tag is refused
        named = client.find_manifest(target) if 400 <= error.status < 500 else None
        if named and named.descriptor.digest == root.digest:
            return root.digest
        raise


def _require_named(reference: Reference, root: Descriptor) -> None:
    if reference.digest and reference.digest != root.digest:
        raise InvalidUsageError(
            f"{reference} names another image than this one, which is {root.digest}",
            hint="give a tag instead of the digest",
        )


def _store(client: RegistryClient, manifest: Document) -> None:
    """Store a manifest under its digest, and see that the registry has it before a tag leads there.

    A registry of the distribution project that is killed while it writes a manifest keeps an empty file, and takes the
    manifest for stored whenever it is sent again (its issue 4489).

    Raises:
        RegistryError: the registry took it, and does not have it.
    """
    digest = manifest.descriptor.digest
    client.put_manifest(digest, manifest.data, manifest.descriptor.media_type)
    try:
        client.manifest(digest)
    except RegistryError as error:
        if isinstance(error, AnswerError) and error.status < 500:
            raise
        name = digest.removeprefix("sha256:")
        raise RegistryError(
            f"{client.transport.host} took a manifest and cannot give it back: {error}",
            hint="its storage is damaged, as a crash leaves it: whoever runs it removes the file of that manifest, "
            f"in Docker's registry docker/registry/v2/blobs/sha256/{name[:2]}/{name}/data; then push again",
        ) from error


def _verify(client: RegistryClient, digest: str, blobs: Sequence[Descriptor]) -> None:
    """Check that the registry has the image, each blob at its size, and the tag.

    Raises:
        RegistryError: something is missing or different.
    """
    for blob in blobs:
        size = client.blob_size(blob.digest)
        if size != blob.size_bytes:
            raise RegistryError(
                f"{client.transport.host} has {size or 'no'} bytes of {blob.digest}, not {blob.size_bytes}",
                hint="push again; if it happens again, the registry's storage is at fault",
            )
    client.manifest(digest)
    tagged = client.manifest(client.reference.tag or client.reference.target).descriptor.digest
    if tagged != digest:
        raise RegistryError(
            f"{client.reference} names {tagged} now: another push moved the tag meanwhile",
            hint=f"the image of this push is whole as {client.reference.pinned(digest)}",
        )
