"""gemma-pack.json: what goes in comes out, byte for byte the same, and old records stay readable for ever."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack import __version__
from gemma_pack.checkpoint import RECORD_NAME
from gemma_pack.errors import CheckpointError
from gemma_pack.record import FileDigest, Metric, Record, SourceRecord, read_record, require_record
from tests.records import quantized_record, validation_record

GOLDEN = Path(__file__).parent / "golden"


def full_record() -> Record:
    return quantized_record().model_copy(update={"validation": validation_record()})


def test_a_record_comes_back_as_it_was(tmp_path: Path):
    assert read_record(tmp_path) is None
    full_record().write(tmp_path)
    assert read_record(tmp_path) == require_record(tmp_path) == full_record()
    assert stat.S_IMODE((tmp_path / RECORD_NAME).stat().st_mode) == 0o644


_floats = st.floats(allow_nan=False)
_metrics = st.builds(
    Metric,
    name=st.text(st.characters(exclude_categories=["Cs"])),
    value=_floats,
    bound=st.none() | _floats,
    margin=st.none() | _floats,
    verdict=st.sampled_from(["pass", "fail", "undecided", "not judged"]),
    unit=st.sampled_from(["", "%", "nats"]),
)


@given(metrics=st.lists(_metrics, max_size=3).map(tuple), note=st.none() | st.text(st.characters(codec="utf-8")))
def test_any_numbers_and_words_come_back_in_json_that_others_can_read(metrics: tuple[Metric, ...], note: str | None):
    validation = validation_record().model_copy(update={"metrics": metrics})
    source = full_record().source.model_copy(update={"note": note})
    record = full_record().model_copy(update={"validation": validation, "source": source})
    assert Record.model_validate_json(record.encode()) == record

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    json.loads(record.encode(), parse_constant=refuse)


def test_a_number_that_is_none_stays_one():
    metric = Metric(name="ppl", value=math.nan)
    assert math.isnan(Metric.model_validate_json(metric.model_dump_json()).value)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path):
    full_record().write(tmp_path)
    written = (tmp_path / RECORD_NAME).read_bytes()
    require_record(tmp_path).write(tmp_path)
    assert (tmp_path / RECORD_NAME).read_bytes() == written == full_record().encode()
    assert full_record().digest() == hashlib.sha256(written).hexdigest()
    assert written.endswith(b"}\n")


def test_nothing_in_a_record_tells_when_or_where_it_was_made():
    names: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, dict):
            names.update(value)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(inner)

    collect(Record.model_json_schema())
    assert not {
        name for name in names if any(word in str(name) for word in ("date", "time", "host", "user", "seconds"))
    }


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("record-v*.json")), ids=lambda path: path.stem)
def test_a_record_that_was_ever_released_is_read_and_written_as_it_was(golden: Path, tmp_path: Path):
    shutil.copy(golden, tmp_path / RECORD_NAME)
    record = require_record(tmp_path)
    assert record.encode() == golden.read_bytes()


def test_the_first_record_says_what_it_always_said(tmp_path: Path):
    shutil.copy(GOLDEN / "record-v1.json", tmp_path / RECORD_NAME)
    record = require_record(tmp_path)
    assert record.gemma_pack_version == "0.1.0"
    assert record.source.files[0].size_bytes == 1000
    assert record.quantization is not None
    assert record.quantization.untouched.changed == ("a.weight", "b.weight")
    assert record.validation is not None
    assert record.validation.metrics[2].bound == 0.0334


def damaged(tmp_path: Path, content: bytes) -> CheckpointError:
    (tmp_path / RECORD_NAME).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_record(tmp_path)
    assert caught.value.hint
    assert str(tmp_path / RECORD_NAME) in caught.value.message
    return caught.value


def test_a_version_from_the_future_is_refused_by_its_number(tmp_path: Path):
    future = json.loads(full_record().encode()) | {"schema_version": 2, "signatures": []}
    error = damaged(tmp_path, json.dumps(future).encode())
    assert error.message.endswith(f"has schema_version 2, which gemma-pack {__version__} does not know")
    assert error.hint == "use the gemma-pack version that wrote it, or a newer one"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "top level: Invalid JSON"),
        (b"\xff", "top level: Invalid JSON"),
        (b"[]", "top level: Input should be an object"),
        (b"{}", "source: Field required"),
        (b'{"source": {"kind": "gift"}}', "source.kind: Input should be 'hub', 'directory' or 'demo'"),
        (b'{"source": {"kind": "demo", "model_id": "a", "files": []}, "more": 1}', "more: Extra inputs are not"),
    ],
)  # fmt: skip
def test_a_broken_record_is_refused_at_its_place(tmp_path: Path, content: bytes, reason: str):
    assert reason in damaged(tmp_path, content).message


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "a/../../b", ""])
def test_a_record_from_a_stranger_names_no_file_outside(path: str):
    with pytest.raises(ValueError, match="leads out of the checkpoint"):
        FileDigest(path=path, sha256="0" * 64, size_bytes=1)


@pytest.mark.parametrize(("sha256", "size_bytes"), [("0" * 63, 1), ("G" * 64, 1), ("0" * 64 + "\n", 1), ("0" * 64, -1)])
def test_digests_and_sizes_are_what_they_say(sha256: str, size_bytes: int):
    with pytest.raises(ValueError, match="validation error"):
        FileDigest(path="model.safetensors", sha256=sha256, size_bytes=size_bytes)


def test_a_directory_without_a_record_is_said_where_one_is_needed(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no gemma-pack\.json") as caught:
        require_record(tmp_path)
    assert caught.value.hint == "pass a directory that gemma-pack quantize wrote"


def test_a_record_cannot_be_changed_under_way():
    with pytest.raises(ValueError, match="frozen"):
        full_record().source = SourceRecord(kind="demo", model_id="a", files=())  # type: ignore[misc]
