"""Damage that a variant can be made to have, and which measure of a validation catches it.

    python bench/damages.py BASE WORK VARIANT...

plants each damage in each variant of BASE and writes what caught what, with figures, to bench/results/damages.json:
what the weights alone must show is audited, the rest is validated (32 windows of 128 tokens) in the directory WORK.
The functions change the tensors of a quantized checkpoint, given by name, in place; the tests use them, too.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from gemma_pack.audit_results import WeightAudit
    from gemma_pack.report import Report

    Tensors = dict[str, Tensor]

RESULTS = Path(__file__).parent / "results" / "damages.json"
MIDDLE, FIRST = "model.layers.9", "model.layers.0"
HEAD_DIM = 256
"""Of Gemma 3 270M."""


def damaged_copy(variant: Path, target: Path, damage: Callable[[Tensors], None]) -> Path:
    """Copy the variant to `target`, with `damage` done to its tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(variant, target)
    files = sorted(target.glob("*.safetensors"))
    names = {path: set(load_file(path)) for path in files}
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    damage(tensors)
    for path in files:
        path.unlink()  # it may share its bytes with another variant
        kept = {name: tensors[name].contiguous() for name in names[path]}
        save_file(kept, path, metadata={"format": "pt"})
    return target


def rescale(tensors: Tensors, layer: str, factor: float) -> None:
    """Take a linear layer's scales times `factor`."""
    scale = tensors[f"{layer}.weight_scale"]
    tensors[f"{layer}.weight_scale"] = (scale.float() * factor).to(scale.dtype)


def swap_heads(tensors: Tensors, layer: str, head_dim: int) -> None:
    """Exchange the first two heads of a query projection, weights and scales."""
    import torch

    for key in ("weight", "weight_packed", "weight_scale"):
        rows = tensors.get(f"{layer}.{key}")
        if rows is not None and rows.ndim == 2 and len(rows) >= 2 * head_dim:
            first, second, rest = rows[:head_dim], rows[head_dim : 2 * head_dim], rows[2 * head_dim :]
            tensors[f"{layer}.{key}"] = torch.cat([second, first, rest])


def exchange(tensors: Tensors, layer: str, other: str) -> None:
    """Exchange two linear layers of one shape."""
    for name in [name for name in tensors if name.startswith(f"{layer}.")]:
        key = name.removeprefix(layer)
        tensors[name], tensors[f"{other}{key}"] = tensors[f"{other}{key}"], tensors[name]


def shift_groups(tensors: Tensors, prefix: str) -> None:
    """Give each group of every linear layer below `prefix` the scale of the group before it."""
    for name in _scales(tensors, prefix):
        scale = tensors[name]
        axis = 1 if scale.shape[-1] > 1 else 0
        tensors[name] = scale.float().roll(1, axis).to(scale.dtype)


def disturb_scales(tensors: Tensors, prefix: str, share: float, *, seed: int = 0) -> None:
    """Take each scale of every linear layer below `prefix` times 1 + `share` · N(0, 1)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name in _scales(tensors, prefix):
        scale = tensors[name]
        tensors[name] = (scale.float() * (1 + share * torch.randn(scale.shape, generator=generator))).to(scale.dtype)


def round_norms(tensors: Tensors) -> None:
    """Store 1 + w of each norm in bfloat16 and subtract 1 again, as upstream's smoothing does on every run."""
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        tensors[name] = (1 + tensors[name]) - 1


def _scales(tensors: Tensors, prefix: str) -> list[str]:
    return sorted(name for name in tensors if name.startswith(prefix) and name.endswith(".weight_scale"))


PLANTED: dict[str, Callable[[Tensors], None]] = {
    "none": dict.copy,
    "honest noise: every scale x (1 + 0.2 %), what bf16 itself rounds by": partial(
        disturb_scales, prefix="model.", share=0.002
    ),
    "one module's scales x 1.03": partial(rescale, layer=f"{MIDDLE}.mlp.down_proj", factor=1.03),
    "two heads of q_proj swapped": partial(swap_heads, layer=f"{MIDDLE}.self_attn.q_proj", head_dim=HEAD_DIM),
    "gate_proj and up_proj exchanged": partial(
        exchange, layer=f"{MIDDLE}.mlp.gate_proj", other=f"{MIDDLE}.mlp.up_proj"
    ),
    "one layer's groups shifted by one": partial(shift_groups, prefix=f"{MIDDLE}."),
    "50 % noise on one layer's scales": partial(disturb_scales, prefix=f"{MIDDLE}.", share=0.5),
    "10 % noise on the first layer's scales": partial(disturb_scales, prefix=f"{FIRST}.", share=0.1),
    "norms rounded": round_norms,
}


AUDITED = ("one module's", "two heads", "gate_proj", "one layer's groups", "norms")
"""How the names of those begin that the audit alone must find."""


def audit_alone(base: Path, variant: Path) -> dict[str, Any]:
    """Return what the weight audit says of a damaged variant."""
    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Console
    from gemma_pack.evaluation.audit import audit_weights
    from gemma_pack.record import require_record

    record = require_record(variant).quantization
    if record is None:
        raise SystemExit(f"{variant} is no variant")
    found = audit_weights(
        Checkpoint.open(base), Checkpoint.open(variant), record, device="cpu", reporter=Console("quiet")
    )
    return _audit(found)


def _audit(audit: WeightAudit | None) -> dict[str, Any]:
    return {
        "audit": [f"{m.name}: {m.problem}" for m in audit.modules if m.problem] if audit else [],
        "altered": len(audit.altered) if audit else 0,
    }


def judge(base: Path, variant: Path, work: Path) -> Report:
    """Validate one variant, with few prompts: what they say is not what is measured here."""
    from gemma_pack.build import validate_variant
    from gemma_pack.console import Console
    from gemma_pack.evaluation.profiles import PROFILES, Profile

    PROFILES["damages"] = Profile("damages", windows=32, sequence_length=128, prompts=2, answer_tokens=4)
    return validate_variant(
        variant,
        work / "report",
        against=str(base),
        recipe_name=str(variant / "recipe.yaml"),
        profile_name="damages",
        text="builtin",
        device="cpu",
        offline=True,
        reporter=Console("quiet"),
    )


def describe(report: Report, clean: Report | None) -> dict[str, Any]:
    """Return what each measure says of a damaged variant; `clean` is the report on it before."""
    from gemma_pack.evaluation.comparison import compare_reports

    costs = {metric.name: metric for metric in report.metrics}
    kl = costs["kl_nats"]
    changes = compare_reports(clean, report) if clean else None
    return {
        "kl_nats": kl.value,
        "kl_bound": kl.bound,
        "kl_margin": kl.margin,
        "ppl_increase_percent": costs["ppl_increase_percent"].value,
        "gate_of_costs": {n: costs[n].verdict for n in ("ppl_increase_percent", "kl_nats", "same_top1_percent")},
        **_audit(report.audit),
        "paired": {c.name: [c.outcome, c.difference, c.lower, c.upper, c.noise] for c in changes.changes}
        if changes
        else {},
    }


def check_bos_and_template(base: Path, variant: Path, work: Path) -> dict[str, str]:
    """Return what the check of <bos> says of windows that lost theirs, and what another chat template meets."""
    from gemma_pack.errors import GemmaPackError
    from gemma_pack.evaluation.comparable import require_same_language
    from gemma_pack.evaluation.engines.in_process import load
    from gemma_pack.evaluation.likelihood import check_bos
    from gemma_pack.texts import load_windows

    said = {}
    model = load(base, "base", "cpu")
    ids = load_windows("builtin", "evaluation", base, samples=2, sequence_length=512, seed=0).ids
    found = check_bos(model, ids)
    said["with <bos>"] = f"perplexity {found.with_bos:.2f} with, {found.without_bos:.2f} without"
    other = work / "other-template"
    shutil.copytree(variant, other, dirs_exist_ok=True)
    (other / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    for name, check in {
        "<bos> missing": lambda: check_bos(model, ids[:, 1:]),
        "another chat template": lambda: require_same_language(other, base),
    }.items():
        try:
            check()
            said[name] = "not caught"
        except GemmaPackError as error:
            said[name] = f"exit {error.exit_code}: {error.message}"
    return said


def main() -> None:
    """Plant every damage, and write what caught it."""
    from gemma_pack.recipe import load_recipe
    from gemma_pack.report import read_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("variant", type=Path, nargs="+")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for variant in options.variant:
        kind = load_recipe(str(variant / "recipe.yaml")).name
        clean: Report | None = None
        for number, (name, damage) in enumerate(PLANTED.items()):
            place = options.work / "variant"
            shutil.rmtree(place, ignore_errors=True)
            if name.startswith(AUDITED):
                found = audit_alone(options.base, damaged_copy(variant, place, damage))
                rows.append({"variant": variant.name, "kind": kind, "damage": name, **found})
                print(json.dumps(rows[-1]), flush=True)
                continue
            kept = options.work / f"{kind}-{number}.json"
            if not kept.exists():  # what an interrupted run has measured stays measured
                report = judge(options.base, damaged_copy(variant, place, damage), options.work)
                kept.write_bytes(report.encode())
            report = read_report(kept)
            rows.append({"variant": variant.name, "kind": kind, "damage": name, **describe(report, clean)})
            print(json.dumps(rows[-1]), flush=True)
            clean = clean or report
    made = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "model": "Gemma 3 270M",
        "rows": rows,
        "refusals": check_bos_and_template(options.base, options.variant[0], options.work),
    }
    RESULTS.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
