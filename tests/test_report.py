"""report.json: its published schema is what is written, and reports that were ever written stay readable."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from gemma_pack.report import (
    GateUsed,
    KernelNoise,
    OtherProtocol,
    Report,
    Spilled,
    json_schema,
    read_report,
)
from tests.records import text_record
from tests.reports.reports import estimate, make_report

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "gemma_pack/reports/report.schema.json"
GOLDEN = Path(__file__).parent / "golden"


def full_report() -> Report:
    plain = make_report()
    kernel = KernelNoise(attention="eager", kl_nats=0.001, same_top1=0.98, ln_ratio=0.0)
    spilled = Spilled(size_bytes=1000, kl_nats=0.0, nll_nats=0.0)
    paper = OtherProtocol(
        name="wikitext2-gptq",
        text=text_record(),
        tokens=2047,
        ppl_base=70,
        ppl_variant=71,
        ln_ratio=estimate(0.01, 0.001),
    )
    return plain.model_copy(
        update={
            "noise_floor": plain.noise_floor.model_copy(update={"kernel": kernel}),
            "engine": plain.engine.model_copy(update={"spilled": spilled}),
            "gate": GateUsed(recipe="w4a16", margins={"kl_nats": 0.05}, overridden=("kl_nats",)),
            "other_protocols": (paper,),
        }
    )


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
