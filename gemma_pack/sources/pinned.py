"""Which commit of a hub model is meant, online and offline, and where that commit is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from gemma_pack.console import Console
from gemma_pack.disk import write_atomic
from gemma_pack.errors import InvalidUsageError, OfflineError
from gemma_pack.sources import hub
from gemma_pack.sources.kept import Source, cache_directory, find_kept, keep

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.console import Reporter


def obtain_pinned(
    model_id: str, revision: str | None, *, output: Path | None, offline: bool, reporter: Reporter
) -> Source:
    """Make `model_id` at `revision`, by default what its main branch is now, available in a directory.

    Without the network: what `output`, gemma-pack's cache or huggingface_hub's cache has of it.

    Raises:
        OfflineError: the hub is needed and cannot be reached.
        InvalidUsageError: `output` holds something else.
    """
    request = _Request(model_id, revision, output, reporter)
    if found := request.find_commit_given():
        return found
    if offline or hub.is_offline():
        if found := request.find_on_this_machine():
            return found
        raise OfflineError(
            f"{model_id} is not on this machine at {revision or 'main'}, and the network is switched off",
            hint="run the same command once without --offline and HF_HUB_OFFLINE",
        )
    try:
        snapshot = hub.look_up(model_id, revision)
    except OfflineError as error:
        found = request.find_on_this_machine()
        if found is None:
            raise
        reporter.warn(f"{error.message}; going on with commit {found.record.revision}, which is on this machine")
        return found
    return request.fetch(snapshot)


def find_pinned(model_id: str, revision: str | None) -> Source | None:
    """Return what gemma-pack's cache has of `model_id` at `revision`, without a look at the hub or at its bytes."""
    request = _Request(model_id, revision, None, Console("quiet"))
    if found := request.find_commit_given():
        return found
    return request.find(request.ref.read_text("utf-8")) if request.ref.is_file() else None


@dataclass(frozen=True, slots=True)
class _Request:
    """What was asked for."""

    model_id: str
    revision: str | None
    output: Path | None
    reporter: Reporter

    @property
    def home(self) -> Path:
        return cache_directory() / "hub" / self.model_id.replace("/", "--")

    @property
    def ref(self) -> Path:
        """The file that holds the commit that the revision named when the hub was last asked."""
        return self.home / "refs" / quote(self.revision or "main", safe="")

    def target(self, commit: str) -> Path:
        return self.output or self.home / commit / self.model_id.rpartition("/")[2]

    def find(self, commit: str) -> Source | None:
        return find_kept(self.target(commit), "hub", self.model_id, commit)

    def find_commit_given(self) -> Source | None:
        """Find a revision that is a commit: it never changes, so there is nothing to ask the hub."""
        pinned = self.revision is not None and hub.COMMIT.fullmatch(self.revision)
        return self.find(str(self.revision)) if pinned else None

    def find_on_this_machine(self) -> Source | None:
        if self.output and self.revision is None and (found := find_kept(self.output, "hub", self.model_id)):
            return found
        if self.ref.is_file() and (found := self.find(self.ref.read_text("utf-8"))):
            return found
        snapshot = hub.find_cached(self.model_id, self.revision)
        return self.fetch(snapshot) if snapshot else None

    def fetch(self, snapshot: hub.Snapshot) -> Source:
        target = self.target(snapshot.commit)
        other = find_kept(self.output, "hub", self.model_id) if self.output else None
        if other and other.record.revision != snapshot.commit:
            raise InvalidUsageError(
                f"{target} holds {self.model_id} at {other.record.revision}, and {self.revision or 'main'} is "
                f"{snapshot.commit}",
                hint=f"choose another directory with -o, or keep what is there with --revision {other.record.revision}",
            )
        source = keep(
            target,
            lambda: self.find(snapshot.commit),
            lambda: hub.fetch_snapshot(snapshot, target, self.reporter),
            disposable=self.output is None,
            reporter=self.reporter,
        )
        if self.output is None:
            self.ref.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.ref, snapshot.commit)
        return source
