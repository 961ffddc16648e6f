"""What sound rounding leaves of the layers of a real model: the figures that the weight audit's bounds rest on.

    python bench/audit.py BASE VARIANT...

Audits each variant against its base and writes, per variant, how far its layers go, to bench/results/audit-bounds.json.
It takes no forward pass: seconds a variant.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
from pathlib import Path

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.console import Console, table
from gemma_pack.evaluation.audit import audit_weights
from gemma_pack.record import require_record

RESULTS = Path(__file__).parent / "results" / "audit-bounds.json"


def measure(base: Path, variant: Path) -> dict[str, object]:
    """Return the extremes over all layers of one variant."""
    record = require_record(variant).quantization
    if record is None:
        raise SystemExit(f"{variant} is no variant")
    found = audit_weights(
        Checkpoint.open(base), Checkpoint.open(variant), record, device="cpu", reporter=Console("quiet")
    )
    if found is None:
        raise SystemExit(f"{variant} has no format that is audited")
    modules = found.modules
    return {
        "recipe": record.recipe,
        "scheme": found.scheme,
        "algorithm": record.algorithm,
        "smoothing": bool(record.smoothing),
        "refined": bool(record.refinement),
        "layers": len(modules),
        "slope_min": round(min(m.slope for m in modules), 5),
        "slope_max": round(max(m.slope for m in modules), 5),
        "slope_deviation": round(max(abs(m.slope - m.expected_slope) for m in modules), 5),
        "snr_db": round(min(m.snr_db for m in modules), 2),
        "worst_group_snr_db": round(min(m.worst_group_snr_db for m in modules), 2),
        "problems": [f"{m.name}: {m.problem}" for m in modules if m.problem],
        "altered": list(found.altered),
    }


def main() -> None:
    """Audit all, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("variants", type=Path, nargs="+")
    options = parser.parse_args()
    rows = [measure(options.base, variant) for variant in options.variants]
    shown = [name for name in rows[0] if name not in {"problems", "altered", "layers"}]
    print(table([[str(row[name]) for name in shown] for row in rows], header=shown))
    for row in rows:
        for problem in (*row["problems"], *row["altered"]):  # type: ignore[misc]  # lists
            print(f"{row['recipe']}: {problem}")
    made = {"date": dt.datetime.now(dt.UTC).date().isoformat(), "model": "Gemma 3 270M", "rows": rows}
    RESULTS.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
