from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.checkpoint import SINGLE_NAME, Checkpoint, write_index
from gemma_pack.console import Console
from gemma_pack.disk import staged_directory
from gemma_pack.errors import (
    AccessError,
    CheckpointError,
    GemmaPackError,
    InvalidUsageError,
    MachineError,
    OfflineError,
    SourceError,
)
from gemma_pack.record import require_record
from gemma_pack.safetensors_file import read_header
from gemma_pack.sources import Source, obtain
from gemma_pack.sources.outline import outline
from tests.sources.conftest import MODEL
from tests.sources.hub_server import TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.sources.hub_server import Hub

WANTED = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    SINGLE_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
}


def get(output: Path | None = None, model: str = MODEL, revision: str | None = None, **options: Any) -> Source:
    options = {"offline": False, "reporter": Console("quiet")} | options
    return obtain(model, revision=revision, output=output, **options)


def content_requests(hub: Hub) -> list[str]:
    return [request.path for request in hub.requests if not request.path.startswith("/api/")]


def fill_library_cache(hub: Hub, directory: Path) -> Path:
    """Lay the model's files out as huggingface_hub caches them, and return the directory of the blobs."""
    home = directory / f"models--{MODEL.replace('/', '--')}"
    commit = hub.commits[MODEL]
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    for sibling in hub.info(MODEL)["siblings"]:
        path = sibling["rfilename"]
        if path in WANTED:
            digest = sibling["lfs"]["sha256"] if "lfs" in sibling else sibling["blobId"]
            (home / "blobs" / digest).write_bytes(hub.models[MODEL][path])
            (home / "snapshots" / commit / path).symlink_to(f"../../blobs/{digest}")
    return home / "blobs"


def test_a_download_holds_what_a_checkpoint_needs_and_nothing_else(hub: Hub, tmp_path: Path):
    source = get(tmp_path / "out")
    assert source.fetched
    assert {path.name for path in source.directory.iterdir()} == WANTED | {"gemma-pack.json"}
    for name in WANTED:
        assert (source.directory / name).read_bytes() == hub.models[MODEL][name]
    assert source.record.kind == "hub"
    assert source.record.revision == hub.commits[MODEL]
    assert source.record.license == "gemma"
    assert {file.path: file.sha256 for file in source.record.files} == {
        name: hashlib.sha256(hub.models[MODEL][name]).hexdigest() for name in WANTED
    }
    assert require_record(source.directory).source == source.record
    assert not [path for path in content_requests(hub) if path.endswith((".bin", ".gguf", "consolidated.safetensors"))]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert source.directory.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in source.directory.iterdir()} == {0o644}


def test_the_second_download_only_asks_which_commit_it_is(hub: Hub, tmp_path: Path):
    get(tmp_path / "out")
    hub.requests.clear()
    assert not get(tmp_path / "out").fetched
    assert [request.path for request in hub.requests] == [f"/api/models/{MODEL}"]


def test_without_an_output_it_is_kept_in_the_cache_under_its_commit_and_name(hub: Hub, tmp_path: Path):
    source = get()
    commit = hub.commits[MODEL]
    assert source.directory == tmp_path / "cache" / "hub" / "google--tiny-gemma" / commit / "tiny-gemma"
    assert not get().fetched


def test_a_commit_that_is_here_needs_no_network(hub: Hub, tmp_path: Path):
    commit = hub.commits[MODEL]
    get(tmp_path / "out")
    hub.requests.clear()
    assert not get(tmp_path / "out", revision=commit).fetched
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["config.json", "gemma-pack.json"])
def test_a_damaged_checkpoint_in_the_cache_is_fetched_again(name: str):
    source = get()
    whole = (source.directory / name).read_bytes()
    (source.directory / name).write_text("{")
    assert get().fetched
    assert (source.directory / name).read_bytes() == whole


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path):
    hub.cut_after[SINGLE_NAME] = [100_000, 150_000]
    get(tmp_path / "out")
    assert [request.headers.get("range") for request in hub.fetched(SINGLE_NAME)] == [
        None,
        "bytes=100000-",
        "bytes=250000-",
    ]


def test_a_connection_that_stays_broken_keeps_what_came_for_the_next_run(hub: Hub, tmp_path: Path):
    hub.cut_after[SINGLE_NAME] = [100_000, *[0] * 9]
    with pytest.raises(SourceError, match="connection broke") as caught:
        get(tmp_path / "out")
    assert "goes on where it stopped" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
    hub.cut_after.clear()
    hub.requests.clear()
    assert get(tmp_path / "out").fetched
    assert [request.headers.get("range") for request in hub.fetched(SINGLE_NAME)] == ["bytes=100000-"]
    assert hub.fetched("tokenizer.json") == []


def test_an_interrupt_keeps_what_came_for_the_next_run(hub: Hub, tmp_path: Path):
    class Interrupting(Console):
        @contextmanager
        def progress(self, *_: object) -> Iterator[Any]:  # type: ignore[override]
            class Task:
                done = 0

                def advance(self, amount: float = 1) -> None:
                    self.done += int(amount)
                    if self.done > 300_000:
                        raise KeyboardInterrupt

            yield Task()

    with pytest.raises(KeyboardInterrupt):
        get(tmp_path / "out", reporter=Interrupting("quiet"))
    assert not (tmp_path / "out").exists()
    hub.requests.clear()
    assert get(tmp_path / "out").fetched
    (request,) = hub.fetched(SINGLE_NAME)
    assert int(request.headers["range"].removeprefix("bytes=").removesuffix("-")) > 0


def test_a_server_without_ranges_starts_the_file_over(hub: Hub, tmp_path: Path):
    hub.ranges = False
    hub.cut_after[SINGLE_NAME] = [100_000]
    directory = get(tmp_path / "out").directory
    assert (directory / SINGLE_NAME).read_bytes() == hub.models[MODEL][SINGLE_NAME]


def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path):
    hub.statuses[SINGLE_NAME] = [503, 429]
    assert get(tmp_path / "out").fetched
    assert len(hub.fetched(SINGLE_NAME)) == 3


@pytest.mark.parametrize("name", [SINGLE_NAME, "config.json"])
def test_a_corrupt_file_is_deleted_and_only_it_is_fetched_again(hub: Hub, tmp_path: Path, name: str):
    hub.corrupt.add(name)
    with pytest.raises(SourceError, match=rf"{name} does not match .* was deleted"):
        get(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path for path in tmp_path.rglob(name) if "pytest" not in path.name] == []
    hub.corrupt.clear()
    hub.requests.clear()
    get(tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == hub.models[MODEL][name]
    assert (len(hub.fetched("tokenizer.json")) == 0) is (name == SINGLE_NAME)


def test_a_gated_model_without_a_login_says_where_to_accept_and_how_to_log_in(hub: Hub, tmp_path: Path):
    hub.gated.add(MODEL)
    with pytest.raises(AccessError, match="gated and you are not logged in") as caught:
        get(tmp_path / "out")
    assert caught.value.exit_code == 13
    assert f"{hub.url}/{MODEL}" in (caught.value.hint or "")
    assert "hf auth login" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir() if "tiny" in path.name or "out" in path.name] == []


def test_a_gated_model_opens_once_the_licence_is_accepted(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.gated.add(MODEL)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(AccessError, match="not been granted access"):
        get(tmp_path / "out")
    hub.granted = True
    assert get(tmp_path / "out").fetched


def test_the_token_stays_with_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    get(tmp_path / "out")
    asked = [request for request in hub.requests if request.path.startswith(f"/{MODEL}/resolve/")]
    stored = [request for request in hub.requests if request.path.startswith("/storage/")]
    assert asked
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in asked)
    assert stored
    assert not any("authorization" in request.headers for request in stored)
    assert TOKEN not in (tmp_path / "out" / "gemma-pack.json").read_text("utf-8")


def test_a_wrong_token_is_an_access_error(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AccessError, match="401"):
        get(tmp_path / "out")
    assert [request.path for request in hub.requests] == [f"/api/models/{MODEL}"]


def test_an_unknown_or_private_model_is_named(hub: Hub, tmp_path: Path):
    with pytest.raises(SourceError, match="has no model google/tiny-gema") as caught:
        get(tmp_path / "out", model="google/tiny-gema")
    assert "check the name" in (caught.value.hint or "")
    hub.private.add(MODEL)
    with pytest.raises(SourceError, match="or it is private"):
        get(tmp_path / "out")


def test_an_unknown_revision_is_named(hub: Hub, tmp_path: Path):
    with pytest.raises(SourceError, match="has no revision v9"):
        get(tmp_path / "out", revision="v9")
    assert hub.requests[0].path == f"/api/models/{MODEL}/revision/v9"


@pytest.mark.parametrize("by_variable", [True, False])
def test_offline_without_a_copy(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, by_variable: bool):
    if by_variable:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError) as caught:
        get(tmp_path / "out", offline=not by_variable)
    assert caught.value.exit_code == 14
    assert hub.requests == []


def test_offline_finds_what_an_earlier_call_kept(hub: Hub, tmp_path: Path):
    kept, named = get(), get(tmp_path / "out")
    hub.requests.clear()
    assert get(offline=True) == Source(kept.directory, kept.record, fetched=False)
    assert get(tmp_path / "out", offline=True) == Source(named.directory, named.record, fetched=False)
    assert hub.requests == []


def test_a_hub_out_of_reach_is_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: int):
    kept = get()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port}")
    with pytest.raises(OfflineError, match="cannot be reached"):
        get(tmp_path / "out", model="google/other")

    class Listening(Console):
        warnings: list[str] = []  # noqa: RUF012 - one instance

        def warn(self, message: str) -> None:
            self.warnings.append(message)

    assert get(reporter=Listening("quiet")).directory == kept.directory
    (warning,) = Listening.warnings
    assert hub.commits[MODEL] in warning


def test_what_the_library_has_cached_is_linked_and_not_fetched(hub: Hub, tmp_path: Path):
    blobs = fill_library_cache(hub, tmp_path / "hf")
    source = get(tmp_path / "out")
    assert content_requests(hub) == []
    weights = next(file for file in source.record.files if file.path == SINGLE_NAME)
    assert (tmp_path / "out" / SINGLE_NAME).samefile(blobs / weights.sha256)


def test_the_library_cache_is_enough_offline(hub: Hub, tmp_path: Path):
    fill_library_cache(hub, tmp_path / "hf")
    source = get(tmp_path / "out", offline=True)
    assert source.record.revision == hub.commits[MODEL]
    assert source.record.license == "gemma"
    assert {file.path for file in source.record.files} == WANTED
    assert hub.requests == []


def test_a_damaged_file_in_the_library_cache_is_fetched_and_left_alone(hub: Hub, tmp_path: Path):
    blobs = fill_library_cache(hub, tmp_path / "hf")
    blob = blobs / hashlib.sha256(hub.models[MODEL][SINGLE_NAME]).hexdigest()
    damaged = blob.read_bytes()[:-1000]
    blob.write_bytes(damaged)
    with pytest.raises(SourceError, match="cache is damaged"):
        get(tmp_path / "offline", offline=True)
    get(tmp_path / "out")
    assert (tmp_path / "out" / SINGLE_NAME).read_bytes() == hub.models[MODEL][SINGLE_NAME]
    assert blob.read_bytes() == damaged


def test_a_library_cache_without_the_weights_is_not_enough_offline(hub: Hub, tmp_path: Path):
    fill_library_cache(hub, tmp_path / "hf")
    (tmp_path / "hf" / "models--google--tiny-gemma" / "snapshots" / hub.commits[MODEL] / SINGLE_NAME).unlink()
    with pytest.raises(OfflineError, match=SINGLE_NAME):
        get(tmp_path / "out", offline=True)


def copied_cache(hub: Hub, directory: Path) -> Path:
    """Fill the library's cache as on a file system without links, and return the snapshot's directory."""
    blobs = fill_library_cache(hub, directory)
    snapshot = blobs.parent / "snapshots" / hub.commits[MODEL]
    for path in list(snapshot.iterdir()):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    return snapshot


def test_a_library_cache_of_copies_is_named_since_nothing_in_it_can_be_checked(hub: Hub, tmp_path: Path):
    snapshot = copied_cache(hub, tmp_path / "hf")
    for look in (lambda: get(tmp_path / "out", offline=True), lambda: outline(MODEL, offline=True)):
        with pytest.raises(SourceError, match="as copies, without the digests to check them by") as caught:
            look()
        assert str(snapshot) in (caught.value.hint or "")
    source = get(model=str(snapshot), offline=True)
    assert (source.record.model_id, source.record.revision) == (MODEL, hub.commits[MODEL])
    assert hub.requests == []


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [gemma\n---\n# x\n",
        b"---\n- a\n- b\n---\n# x\n",
        b"---\nlicense: gemma\n---\nM\xfcller\n",
        b"---\nlicense: gemma\ntags: *x\n---\n",
    ],
    ids=["yaml", "list", "latin-1", "alias"],
)
def test_a_card_that_only_people_can_read_names_no_licence(hub: Hub, tmp_path: Path, card: bytes):
    hub.add(MODEL, hub.models[MODEL] | {"README.md": card})
    fill_library_cache(hub, tmp_path / "hf")
    assert outline(MODEL, offline=True).revision == hub.commits[MODEL]
    assert get(tmp_path / "out", offline=True).record.license == "unknown"


def test_an_adapter_is_no_model(hub: Hub, tmp_path: Path):
    hub.add("me/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 20_000})
    for look in (lambda: get(tmp_path / "out", model="me/lora"), lambda: outline("me/lora")):
        with pytest.raises(SourceError, match="me/lora is a LoRA adapter, not a model") as caught:
            look()
        assert "merge_and_unload" in (caught.value.hint or "")
    assert content_requests(hub) == []


def test_what_came_is_left_alone_by_others_that_make_the_same_directory(hub: Hub, tmp_path: Path):
    hub.cut_after[SINGLE_NAME] = [100_000, *[0] * 9]
    with pytest.raises(SourceError, match="connection broke"):
        get(tmp_path / "out")
    with staged_directory(tmp_path / "out"):
        pass
    (tmp_path / "out").rmdir()
    hub.cut_after.clear()
    hub.requests.clear()
    get(tmp_path / "out")
    assert [request.headers.get("range") for request in hub.fetched(SINGLE_NAME)] == ["bytes=100000-"]


def test_what_came_of_another_commit_goes_when_the_directory_is_there(hub: Hub, tmp_path: Path):
    hub.cut_after[SINGLE_NAME] = [100_000, *[0] * 9]
    with pytest.raises(SourceError, match="connection broke"):
        get(tmp_path / "out")
    hub.cut_after.clear()
    mine = tmp_path / ".out.download-notes"
    mine.mkdir()
    assert len(list(tmp_path.glob(".out.download-*"))) == 2
    hub.add(MODEL, hub.models[MODEL] | {"README.md": b"# Newer\n"})
    get(tmp_path / "out")
    assert list(tmp_path.glob(".out.*")) == [mine]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "llama"}, "not a Gemma"), ({"dtype": "float16"}, "float16"), ({"dtype": "float32"}, "float32")],
)
def test_what_cannot_be_quantized_is_refused_before_the_weights(
    hub: Hub, tmp_path: Path, change: dict[str, str], message: str
):
    files = hub.models[MODEL]
    config = json.dumps(json.loads(files["config.json"]) | change).encode()
    hub.add(MODEL, files | {"config.json": config})
    with pytest.raises(CheckpointError, match=message):
        get(tmp_path / "out")
    assert [Path(path).name for path in content_requests(hub)] == ["config.json"]
    assert [path for path in tmp_path.iterdir() if "download" in path.name] == []


def test_only_the_shards_that_the_index_names_are_fetched(hub: Hub, tmp_path: Path, tiny_checkpoint: Path):
    files = dict(hub.models[MODEL])
    shard = "model-00001-of-00001.safetensors"
    files[shard] = files.pop(SINGLE_NAME)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / shard).write_bytes(files[shard])
    write_index(tmp_path / "index", read_header(tmp_path / "index" / shard))
    index = tmp_path / "index" / "model.safetensors.index.json"
    files[index.name] = index.read_bytes()
    hub.add(MODEL, files)
    source = get(tmp_path / "out")
    assert {path.name for path in source.directory.glob("*.safetensors")} == {shard}
    assert len(Checkpoint.open(source.directory).tensors) == len(Checkpoint.open(tiny_checkpoint).tensors)
    del files[shard]
    hub.add(MODEL, files)
    with pytest.raises(SourceError, match=f"has no {shard}"):
        get(tmp_path / "other")


def test_pickled_weights_are_no_weights(hub: Hub, tmp_path: Path):
    files = dict(hub.models[MODEL])
    del files[SINGLE_NAME]
    hub.add(MODEL, files)
    with pytest.raises(SourceError, match=r"has no model\.safetensors") as caught:
        get(tmp_path / "out")
    assert "pickled" in (caught.value.hint or "")


def test_a_disk_too_small_is_found_out_before_the_weights(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(MachineError, match="free"):
        get(tmp_path / "out")
    assert hub.fetched(SINGLE_NAME) == []


def test_a_directory_with_another_commit_stays_as_it_is(hub: Hub, tmp_path: Path):
    old = get(tmp_path / "out").record.revision
    hub.add(MODEL, hub.models[MODEL] | {"README.md": b"# Newer\n"})
    with pytest.raises(InvalidUsageError, match=rf"{old}.*{hub.commits[MODEL]}") as caught:
        get(tmp_path / "out")
    assert f"--revision {old}" in (caught.value.hint or "")
    assert not get(tmp_path / "out", revision=old).fetched


def test_something_else_in_the_way_is_not_touched(hub: Hub, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(InvalidUsageError, match="in the way"):
        get(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"
    assert content_requests(hub) == []


def test_two_at_once_fetch_once(hub: Hub, tmp_path: Path):
    outcomes: list[Source | GemmaPackError] = []

    def fetch() -> None:
        try:
            outcomes.append(get(tmp_path / "out"))
        except GemmaPackError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcome.fetched for outcome in outcomes if isinstance(outcome, Source)) == [False, False, True]
    assert len(hub.fetched(SINGLE_NAME)) == 1


def test_an_answer_that_is_no_hub_is_an_error(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "info", lambda _: {"id": MODEL, "siblings": []})
    with pytest.raises(SourceError, match="names no commit"):
        get(tmp_path / "out")
