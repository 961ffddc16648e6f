"""report.json: its published schema is what is written, and reports that were ever written stay readable."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from gemma_pack.report import Report, json_schema, read_report
from tests.reports.reports import full_report, make_report

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "gemma_pack/reports/report.schema.json"
GOLDEN = Path(__file__).parent / "golden"


def test_the_schema_that_is_published_is_that_of_the_code():
    assert json.loads(SCHEMA.read_text("utf-8")) == json_schema(), (
        "write it again: python -c 'import json; from gemma_pack.report import json_schema; "
        f"print(json.dumps(json_schema(), indent=1))' > {SCHEMA.relative_to(ROOT)}"
    )


@pytest.mark.parametrize("report", [make_report(), full_report()], ids=["plain", "full"])
def test_reports_keep_to_the_schema(report: Report):
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))
    written = json.loads(report.encode())
    assert list(validator.iter_errors(written)) == []
    assert list(validator.iter_errors({**written, "verdict": "fine"})) != []
    assert Report.model_validate_json(report.encode()) == report


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("report-v*.json")), ids=lambda path: path.stem)
def test_a_report_that_was_ever_written_is_read_and_written_as_it_was(golden: Path):
    report = read_report(golden)
    assert f"v{report.schema_version}" in golden.name
    assert report.encode() == golden.read_bytes()
