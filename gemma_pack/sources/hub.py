"""Weights from a model hub, pinned to a commit, with every file checked against the digest that the hub names.

What the hub says about a model comes through huggingface_hub, and so do login, endpoint and the files that its cache
holds already. Only safetensors, config, tokenizer and licence files are fetched: never pickles.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx
from huggingface_hub import HfApi, constants, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # not in its __all__

from gemma_pack import __version__
from gemma_pack.checkpoint import (
    ADAPTER_NAME,
    INDEX_NAME,
    MERGE_FIRST,
    SINGLE_NAME,
    Checkpoint,
    file_sha256,
    read_json,
)
from gemma_pack.disk import publish, refuse_existing, require_space
from gemma_pack.errors import AccessError, CheckpointError, InvalidUsageError, OfflineError, SourceError
from gemma_pack.gemma import require_supported
from gemma_pack.record import FileDigest, Record, SourceRecord
from gemma_pack.sources.directory import require_bf16_tensors
from gemma_pack.sources.files import is_wanted
from gemma_pack.sources.kept import cache_directory
from gemma_pack.sources.licences import card_licence, spelled
from gemma_pack.sources.transfer import RemoteFile, fetch_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from huggingface_hub.hf_api import ModelInfo, RepoSibling

    from gemma_pack.console import Reporter

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_BLOB_NAME: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_API_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A model at one commit: the files that a checkpoint needs, and its licence."""

    model_id: str
    commit: str
    license: str
    files: tuple[RemoteFile, ...]
    is_adapter: bool = False
    """The repository has an adapter's config."""

    def require_config(self) -> RemoteFile:
        """Return config.json; raise SourceError where there is none."""
        for file in self.files:
            if file.path == "config.json":
                return file
        if self.is_adapter:
            raise SourceError(f"{self.model_id} is a LoRA adapter, not a model", hint=MERGE_FIRST)
        raise SourceError(
            f"{self.model_id} has no config.json", hint="use the repository that holds the transformers checkpoint"
        )


def is_offline() -> bool:
    """Tell whether HF_HUB_OFFLINE, or one of its older names, forbids the network."""
    return constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def look_up(model_id: str, revision: str | None) -> Snapshot:
    """Ask the hub what `model_id` is at `revision`, by default its main branch.

    Raises:
        SourceError: there is no such model or revision, or the hub misbehaves.
        AccessError: the token is not valid.
        OfflineError: the hub cannot be reached.
    """
    with translated_errors(model_id, revision):
        api = HfApi(endpoint=_endpoint(), library_name="gemma-pack", library_version=__version__)
        info = api.model_info(model_id, revision=revision, files_metadata=True, timeout=_API_TIMEOUT_S)
    if not info.sha or not COMMIT.fullmatch(info.sha):
        raise SourceError(f"{_endpoint()} names no commit for {model_id}", hint="check HF_ENDPOINT")
    files = tuple(
        _remote_file(model_id, info.sha, sibling) for sibling in info.siblings or () if is_wanted(sibling.rfilename)
    )
    adapter = any(sibling.rfilename == ADAPTER_NAME for sibling in info.siblings or ())
    return Snapshot(model_id=model_id, commit=info.sha, license=_license(info), files=files, is_adapter=adapter)


def find_cached(model_id: str, revision: str | None) -> Snapshot | None:
    """Return the snapshot as huggingface_hub's cache has it, without the network; None where it has none.

    The cache names each file after the digest that the hub gave, so the files can be checked here too. Where it could
    make no links, as on some file systems, it has copies under their own names instead.

    Raises:
        SourceError: the cache has copies, of which nothing can be checked.
    """
    config = try_to_load_from_cache(model_id, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    directory = Path(config).parent
    names = {path: path.readlink().name for path in directory.iterdir() if path.is_symlink() and is_wanted(path.name)}
    if Path(config) not in names:
        raise SourceError(
            f"huggingface_hub's cache has {model_id} as copies, without the digests to check them by",
            hint=f"give the directory itself as the model, to be taken as it is: {directory}",
        )
    files = tuple(
        RemoteFile(
            path=path.name,
            url="",
            size_bytes=path.stat().st_size,
            algorithm="sha256" if len(digest) == 64 else "git-blob-sha1",
            digest=digest,
            cached=path,
        )
        for path, digest in sorted(names.items())
        if _BLOB_NAME.fullmatch(digest) and path.exists()
    )
    return Snapshot(
        model_id=model_id,
        commit=directory.name,
        license=card_licence(directory / "README.md") or "unknown",
        files=files,
    )


def fetch_snapshot(snapshot: Snapshot, target: Path, reporter: Reporter) -> SourceRecord:
    """Make `target` a checked checkpoint of `snapshot`; it appears whole or not at all.

    What has come of an interrupted download waits in a hidden directory beside `target`, and the next call goes on.

    Raises:
        CheckpointError: not a supported Gemma, not bf16, or not a whole checkpoint.
        SourceError: there are no safetensors, a file does not match its digest, or the connection broke.
        AccessError: the model is gated and this machine has no access.
        OfflineError: the hub cannot be reached and huggingface_hub's cache lacks a file.
        MachineError: the disk is too small.
        InvalidUsageError: something is at `target` already.
    """
    lock = cache_directory() / "locks" / hashlib.sha256(str(target.absolute()).encode()).hexdigest()[:16]
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        refuse_existing(target)
        staging = target.absolute().parent / f".{target.name}.download-{snapshot.commit[:12]}"
        staging.mkdir(parents=True, exist_ok=True)
        try:
            record = _fill(snapshot, staging, reporter)
        except CheckpointError:
            shutil.rmtree(staging)  # whole, and not what we can use
            raise
        except BaseException:
            if not any(staging.iterdir()):
                staging.rmdir()
            raise
        publish(staging, target)
        for left in target.absolute().parent.glob(f".{glob.escape(target.name)}.download-{'[0-9a-f]' * 12}"):
            shutil.rmtree(left, ignore_errors=True)  # of other commits, which nobody goes on with now
    return record


def _fill(snapshot: Snapshot, staging: Path, reporter: Reporter) -> SourceRecord:
    """Bring all files of the snapshot into `staging`, the telling ones first, and check what they make up."""
    small = [file for file in snapshot.files if not file.path.endswith(".safetensors")]
    config = snapshot.require_config()
    with translated_errors(snapshot.model_id, snapshot.commit):
        _bring("config.json", [config], staging, reporter)
        require_supported(read_json(staging / "config.json"))  # before gigabytes are fetched
        _bring("tokenizer", small, staging, reporter)
        weights = _weights(snapshot, staging)
        _bring("weights", weights, staging, reporter)
    checkpoint = Checkpoint.open(staging)
    require_bf16_tensors(checkpoint)
    checkpoint.require_tokenizer()
    files = tuple(
        FileDigest(
            path=file.path,
            sha256=file.digest if file.algorithm == "sha256" else file_sha256(staging / file.path),
            size_bytes=file.size_bytes,
        )
        for file in sorted((*small, *weights), key=lambda file: file.path)
    )
    source = SourceRecord(
        kind="hub", model_id=snapshot.model_id, revision=snapshot.commit, files=files, license=snapshot.license
    )
    Record(source=source).write(staging)
    return source


def _bring(what: str, files: Sequence[RemoteFile], staging: Path, reporter: Reporter) -> None:
    """Fetch or link `files` into `staging`, after a look at the space they need."""
    device = staging.stat().st_dev
    needed = 0
    for file in files:
        linked = file.cached is not None and file.cached.stat().st_dev == device
        path = staging / file.path
        needed += 0 if linked else file.size_bytes - (path.stat().st_size if path.exists() else 0)
    require_space(staging, needed)
    headers = build_hf_headers(library_name="gemma-pack", library_version=__version__)
    fetch_files(files, staging, label=f"Downloading {what}", headers=headers, client=get_session(), reporter=reporter)


def _weights(snapshot: Snapshot, staging: Path) -> list[RemoteFile]:
    """Return the safetensors that the index names, or the single one where there is no index."""
    available = {file.path: file for file in snapshot.files if file.path.endswith(".safetensors")}
    index = staging / INDEX_NAME
    weight_map = read_json(index).get("weight_map") if index.exists() else {"": SINGLE_NAME}
    if not isinstance(weight_map, dict):
        raise SourceError(f"{INDEX_NAME} of {snapshot.model_id} has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    require_files(snapshot, names)
    return [available[name] for name in names]


def require_files(snapshot: Snapshot, names: Sequence[str]) -> None:
    """Raise where the snapshot lacks one of the safetensors: OfflineError where it is the library's cache that does."""
    there = {file.path for file in snapshot.files}
    missing = next((name for name in names if name not in there or not name.endswith(".safetensors")), None)
    if missing is None:
        return
    if not all(file.url for file in snapshot.files):
        raise OfflineError(
            f"{missing} of {snapshot.model_id} is not on this machine", hint="run the same command with the network"
        )
    raise SourceError(
        f"{snapshot.model_id} has no {missing} at {snapshot.commit}",
        hint="only safetensors are read; pickled .bin weights are refused because loading them runs their code",
    )


def _remote_file(model_id: str, commit: str, sibling: RepoSibling) -> RemoteFile:
    """Return one file of the hub's answer; raise SourceError where it names no digest."""
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    size = sibling.lfs.size if sibling.lfs else sibling.size
    if digest is None or size is None or not _BLOB_NAME.fullmatch(digest):
        raise SourceError(f"{_endpoint()} names no digest for {sibling.rfilename}", hint="check HF_ENDPOINT")
    cached = try_to_load_from_cache(model_id, sibling.rfilename, revision=commit)
    return RemoteFile(
        path=sibling.rfilename,
        url=hf_hub_url(model_id, sibling.rfilename, revision=commit, endpoint=_endpoint()),
        size_bytes=size,
        algorithm="sha256" if sibling.lfs else "git-blob-sha1",
        digest=digest,
        cached=Path(cached) if isinstance(cached, str) else None,
    )


def _endpoint() -> str:
    """Return the hub's address. huggingface_hub reads HF_ENDPOINT once, at its import; this does at each call."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _license(info: ModelInfo) -> str:
    card = info.card_data
    return (spelled(card.get("license"), card.get("license_name")) if card else None) or "unknown"


@contextmanager
def translated_errors(model_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub and httpx raise into our errors."""
    page = f"{_endpoint()}/{model_id}"
    login = "hf auth login"
    try:
        yield
    except GatedRepoError as error:
        reason = "you have not been granted access" if error.response.status_code == 403 else "you are not logged in"
        raise AccessError(
            f"{model_id} is gated and {reason}", hint=f"accept the licence on {page} and log in with: {login}"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{_endpoint()} has no model {model_id}, or it is private",
            hint=f"check the name, which is no directory here either; if the model is private, log in with: {login}",
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{model_id} has no revision {revision}", hint=f"see {page}/commits/main") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise AccessError(
                f"the hub refused access to {model_id} ({status})",
                hint=f"accept the licence on {page} and log in with: {login}",
            ) from error
        raise SourceError(f"the hub answered {status} for {model_id}", hint="try again later") from error
    except HFValidationError as error:
        raise InvalidUsageError(
            f"{model_id} is no hub id: {error}", hint="a hub id looks like google/gemma-2-9b-it"
        ) from error
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        raise OfflineError(
            f"{_endpoint()} cannot be reached: {error}", hint="check the network, or use demo or a directory"
        ) from error
    except ValueError as error:
        raise SourceError(f"{_endpoint()} does not answer as a model hub: {error}", hint="check HF_ENDPOINT") from error
