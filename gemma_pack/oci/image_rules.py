"""What a file system for models must be like: the rules of KServe's three modes and of container runtimes.

Pure functions of what `inspection` found, each with the source of its rule.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from gemma_pack.oci.extraction import GZIP_TYPES, PLAIN_TYPES
from gemma_pack.oci.finding import FILE_READERS, RUNTIMES, TAR_READERS, Consumer, Finding, absent, listed
from gemma_pack.oci.inspection import model_path
from gemma_pack.oci.layers import MODELS_DIRECTORY
from gemma_pack.oci.manifest import GZIP_LAYER_TYPE, LAYER_TYPE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma_pack.oci.inspection import Inspection
    from gemma_pack.oci.tar_reader import Member

SHELL_PROGRAMS: Final = ("sh", "ls", "ln", "sleep")
"""What KServe calls in the image, `[` and `echo` being the shell's own (pkg/utils/storage.go,
CreateModelcarContainer and CreateModelcarInitContainer)."""
FETCHED_TYPES: Final = frozenset({
    LAYER_TYPE, GZIP_LAYER_TYPE, "application/vnd.docker.image.rootfs.diff.tar.gzip",
})  # fmt: skip
"""Of layers that KServe's fetch reads; it passes over others (kserve_storage.py, `_LAYER_MEDIA_TYPE_MODES`)."""
MOUNTABLE_LAYERS: Final = 127
"""Docker's limit (moby#26380)."""
LAYERS_OF_OLD_RUNTIMES: Final = 60
"""Mount options of overlayfs must fit into a page of 4 KiB; older containerd writes long ones (containerd#4810)."""
_PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where a runtime looks if the image does not say (containerd, pkg/oci `defaultUnixEnv`)."""


def is_image(inspection: Inspection) -> Iterator[Finding]:
    """Runtimes mount images of containers, not artifacts (containerd#11907; for CRI-O, KServe's subPath finds nothing).

    KServe's native mode mounts with `subPath: models` (pkg/utils/storage.go), which raw files do not have.
    """
    if not inspection.is_runnable:
        yield Finding(
            severity="fails",
            consumers=RUNTIMES,
            message=f"it is no image of a container: its configuration is {inspection.manifest.config.media_type}",
            remedy="gemma-pack package --layout modelcar",
        )


def known_layers(inspection: Inspection) -> Iterator[Finding]:
    """Runtimes unpack tars, gzipped, zstd or plain; fetch knows no zstd and passes over what else it does not know."""
    kinds = {layer.descriptor.media_type for layer in inspection.layers}
    hidden = {layer.descriptor.media_type for layer in inspection.layers if any(map(_path, layer.members))}
    for kind in sorted(kinds):
        if kind.endswith("zstd"):
            yield Finding(
                severity="fails",
                consumers=("fetch",),
                message=f"a layer is {kind}, which Python 3.11's tarfile cannot read",
                remedy="build it with uncompressed layers",
            )
            others = (*RUNTIMES, *FILE_READERS)
            yield Finding(
                severity="unknown", consumers=others, message="a layer is zstd, which is not read here either"
            )
        elif kind not in PLAIN_TYPES | GZIP_TYPES and inspection.is_runnable:
            yield Finding(severity="fails", consumers=TAR_READERS, message=f"a layer is {kind}, which nothing unpacks")
        elif kind in hidden - FETCHED_TYPES:
            yield Finding(
                severity="fails",
                consumers=("fetch",),
                message=f"a layer with the model is {kind}, which fetch passes over",
                remedy=f"make it {LAYER_TYPE}",
            )


def models_directory(inspection: Inspection) -> Iterator[Finding]:
    """The init container wants a non-empty /models; native mounts it; fetch wants names that begin with `models/`.

    Sources: CreateModelcarInitContainer; kserve_storage.py, `_download_oci`: `name.startswith("models/")`.
    """
    members = [member for layer in inspection.layers for member in layer.members if _path(member)]
    tarred = any(file.member for file in inspection.files.values())
    if not tarred and (inspection.is_runnable or not inspection.files):
        yield Finding(
            severity=absent(inspection),
            consumers=TAR_READERS,
            message="there is no file below /models",
            remedy="COPY the checkpoint to /models",
        )
    elif not tarred:
        yield Finding(
            severity="fails", consumers=("fetch",), message="its layers are no tars with /models, but files as they are"
        )
    odd = [member.name for member in members if not member.name.startswith(f"{MODELS_DIRECTORY}/")]
    if odd:
        yield Finding(
            severity="fails",
            consumers=("fetch",),
            message=f"{listed(odd)} begin otherwise than with models/, and fetch takes nothing else",
            remedy="write tar names without ./ and /",
        )


def readable_files(inspection: Inspection) -> Iterator[Finding]:
    """The server runs under another user than the image's files (KServe's uidModelcar; OpenShift's own, with gid 0)."""
    closed: list[str] = []
    group_only: list[str] = []
    for layer in inspection.layers:
        for member in layer.members:
            wanted = {"file": 0o4, "directory": 0o5}.get(member.kind)
            if wanted is None or model_path(member.name) is None or member.mode & wanted == wanted:
                continue
            by_group = member.gid == 0 and (member.mode >> 3) & wanted == wanted
            (group_only if by_group else closed).append(f"{member.name} ({member.mode & 0o777:04o})")
    if closed:
        yield Finding(
            severity="fails",
            consumers=("modelcar", "native"),
            message=f"{listed(closed)} cannot be read by the server's user",
            remedy="files 0644, directories 0755",
        )
    if group_only:
        yield Finding(
            severity="warning",
            consumers=("modelcar", "native"),
            message=f"{listed(group_only)} can be read on OpenShift only, where every user has gid 0",
            remedy="files 0644, directories 0755",
        )


def links(inspection: Inspection) -> Iterator[Finding]:
    """A link must stay below /models; fetch extracts with tarfile's `data` filter and takes `models/` off the names.

    So an absolute link leads elsewhere for all three, and a hard link's target is not found by fetch. Source: Python,
    tarfile, "Default named filters"; kserve_storage.py, `_download_oci`.
    """
    for layer in inspection.layers:
        for member in layer.members:
            path = _path(member)
            if not path or member.kind != "other":
                continue
            whom: tuple[Consumer, ...] = ("fetch",)
            if member.link is None:
                message = f"{member.name} is a device or a pipe"
            elif member.is_hard_link:
                message = f"{member.name} is a hard link, which fetch cannot follow"
            elif _leaves(path, member.link):
                message = f"{member.name} is a link that leaves /models: {member.link[:100]!a}"
                whom = ("modelcar", "native", "fetch")
            else:
                continue
            yield Finding(severity="fails", consumers=whom, message=message, remedy="pack the file itself")


def deletions(inspection: Inspection) -> Iterator[Finding]:
    """Fetch unpacks layer after layer and knows no whiteouts (kserve_storage.py; image-spec layer.md, "Whiteouts")."""
    names = [m.name for layer in inspection.layers for m in layer.members if "/.wh." in f"/{m.name}" and _path(m)]
    if names:
        yield Finding(
            severity="fails",
            consumers=("fetch",),
            message=f"{listed(names)} deletes what a layer below holds, and fetch keeps that",
            remedy="build the image without deleting files",
        )


def different_twins(inspection: Inspection) -> Iterator[Finding]:
    """Of two files with one path the last layer's counts (konflux-ci build-definitions#3732 shipped a wrong config)."""
    sizes: dict[str, set[int]] = {}
    for layer in inspection.layers:
        for member in layer.members:
            path = _path(member)
            if path and member.kind == "file":
                sizes.setdefault(path, set()).add(member.size_bytes)
    names = [path for path, found in sizes.items() if len(found) > 1]
    if names:
        yield Finding(
            severity="warning",
            consumers=TAR_READERS,
            message=f"{listed(names)} is there more than once, with different sizes; the last one counts",
            remedy="build the image again, from one directory",
        )


def shell(inspection: Inspection) -> Iterator[Finding]:
    """The modelcar sidecar runs `sh -c 'ln … && sleep infinity'` in the image, or its link-and-wait program does it."""
    if inspection.programs is None:
        return
    environment = inspection.runtime.get("Env")
    told = [one for one in environment if str(one).startswith("PATH=")] if isinstance(environment, list) else []
    folders = str((told or [_PATH])[0]).removeprefix("PATH=").split(":")
    places = [folder.strip("/") for folder in folders if folder]
    missing = [name for name in SHELL_PROGRAMS if not any(f"{one}/{name}" in inspection.programs for one in places)]
    if missing:
        yield Finding(
            severity=absent(inspection),
            consumers=("modelcar",),
            message=f"the image has no {', '.join(missing)}, and KServe's sidecar calls it",
            remedy="gemma-pack package --base embedded, or a base with a shell, or oci+native://",
        )
    entry_point = inspection.runtime.get("Entrypoint")
    if entry_point and not missing:
        yield Finding(
            severity="unknown",
            consumers=("modelcar",),
            message=f"its entry point {str(entry_point)[:80]!a} gets KServe's `sh -c …`, and may not pass it on",
            remedy="build it without an ENTRYPOINT",
        )


def diff_ids(inspection: Inspection) -> Iterator[Finding]:
    """Runtimes compare each layer, inflated, with the configuration's rootfs (image-spec config.md, "rootfs")."""
    if not inspection.is_runnable:
        return
    rootfs = inspection.configuration.get("rootfs")
    told = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    told = told if isinstance(told, list) else []
    plain = [
        (layer.digest, diff_id)
        for layer, diff_id in zip(inspection.manifest.layers, told, strict=False)
        if layer.media_type in PLAIN_TYPES
    ]
    if len(told) != len(inspection.manifest.layers):
        message = f"its configuration has {len(told)} diff_ids for {len(inspection.manifest.layers)} layers"
    elif any(digest != diff_id for digest, diff_id in plain):
        message = "an uncompressed layer has another digest than the diff_id that its configuration gives it"
    else:
        return
    yield Finding(severity="fails", consumers=RUNTIMES, message=message, remedy="build the image again")


def layer_count(inspection: Inspection) -> Iterator[Finding]:
    """Overlay file systems stack a limited number of layers."""
    count = len(inspection.manifest.layers)
    if inspection.is_runnable and count > LAYERS_OF_OLD_RUNTIMES:
        much = count > MOUNTABLE_LAYERS
        yield Finding(
            severity="fails" if much else "warning",
            consumers=RUNTIMES,
            message=f"it has {count} layers, and {'runtimes' if much else 'older runtimes'} mount "
            f"{MOUNTABLE_LAYERS if much else LAYERS_OF_OLD_RUNTIMES}",
            remedy="put more shards into a layer",
        )


def compressed_weights(inspection: Inspection) -> Iterator[Finding]:
    """Weights do not shrink: "recommended to package model weights without compression" (CNCF model-spec, spec.md)."""
    gzipped = [
        layer.descriptor.digest
        for layer in inspection.layers
        if layer.descriptor.media_type in GZIP_TYPES
        and any(member.name.endswith(".safetensors") for member in layer.members)
    ]
    if gzipped:
        yield Finding(
            severity="warning",
            consumers=TAR_READERS,
            message=f"{len(gzipped)} layers of weights are gzipped: each start inflates them, and they hardly shrink",
            remedy="gemma-pack push, or skopeo copy --preserve-digests",
        )


def pax_sizes(inspection: Inspection) -> Iterator[Finding]:
    """Clair, the scanner of Quay, does not read sizes over 8 GiB from pax headers (olot#210)."""
    names = [m.name for layer in inspection.layers for m in layer.members if m.has_pax_size]
    if names:
        yield Finding(
            severity="warning",
            consumers=(),
            message=f"{listed(names)} has its size in a pax header, which Quay's scanner does not read",
            remedy="write GNU tar headers",
        )


def _path(member: Member) -> str | None:
    """Return a member's path below /models, or nothing for what lies elsewhere and for /models itself."""
    return model_path(member.name) or None


def _leaves(path: str, link: str) -> bool:
    depth = len(PurePosixPath(path).parts) - 1
    for part in PurePosixPath(link).parts:
        depth += -1 if part == ".." else 1
        if depth < 0 or part == "/":
            return True
    return False
