"""Tokens a second: our scoring of base and variant, with KL, beside lm-evaluation-harness's rolling perplexity.

    python bench/scoring.py BASE VARIANT [--windows 16] [--length 512] [--repeats 3]

The same text, cut alike, on the same machine in the same run. The harness scores one model (`HFLM`, its
`loglikelihood_rolling`, as its wikitext task does): the base in bf16 with several batch sizes, and with the one that
suited it best the variant, and the base once more in float32, other arithmetic, but faster on some processors. Ours
scores both models and the divergence of the whole vocabulary. Loading is left out of both. Each contender has a process
of its own, with torch's threads waiting by torch's default in the harness, and as our command line sets it in ours.
What memory scoring takes beside the models is bounded by a test (tests/real/test_validation.py). The table goes to
stdout and to bench/results/scoring-RECIPE.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import machine

from gemma_pack.console import table

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "transformers", "lm-eval")


def text_of(base: Path, windows: int, length: int) -> tuple[str, int]:
    """Return evaluation text of about so many windows, and its number of tokens."""
    from gemma_pack.text_sources import builtin_halves
    from gemma_pack.tokenizer import load_tokenizer

    tokenizer, _ = load_tokenizer(base)
    ids = tokenizer.encode("\n\n".join(builtin_halves()[1]), add_special_tokens=False).ids
    text: str = tokenizer.decode(ids[: windows * (length - 1)])
    return text, len(tokenizer.encode(text, add_special_tokens=False).ids)


def time_harness(model: Path, text: str, length: int, batch: int, dtype: str, repeats: int) -> dict[str, object]:
    """Return seconds of each repeat of the harness's rolling perplexity; `dtype` is `bfloat16` or `float32`."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=str(model), dtype=dtype, batch_size=batch, max_length=length, add_bos_token=False, device="cpu"
    )
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    seconds, nll = [], 0.0
    lm.loglikelihood_rolling(  # a variant of compressed-tensors is unpacked in its first pass
        [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text[:100],), idx=0)], disable_tqdm=True
    )
    for _ in range(repeats):
        begin = time.monotonic()
        [nll] = lm.loglikelihood_rolling([request], disable_tqdm=True)
        seconds.append(time.monotonic() - begin)
    return {"seconds": seconds, "nll": -nll}


def time_ours(base: Path, variant: Path, text: str, length: int, repeats: int) -> dict[str, object]:
    """Return seconds of each repeat of scoring both models with KL on the same tokens."""
    import numpy as np

    from gemma_pack.console import Console
    from gemma_pack.evaluation.engines.in_process import load
    from gemma_pack.evaluation.likelihood import score
    from gemma_pack.tokenizer import load_tokenizer

    tokenizer, bos = load_tokenizer(base)
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    ids = ids[: len(ids) // (length - 1) * (length - 1)].reshape(-1, length - 1)
    windows = np.concatenate([np.full((len(ids), 1), bos, np.int32), ids], axis=1)
    models = load(base, "base", "cpu"), load(variant, "variant", "cpu")
    seconds, nll, kl = [], 0.0, 0.0
    for _ in range(repeats):
        begin = time.monotonic()
        scores = score(*models, windows, Console("quiet"))
        seconds.append(time.monotonic() - begin)
        nll, kl = float(scores.nll_base.sum(dtype=np.float64)), float(scores.kl_nats.mean())
    return {
        "seconds": seconds, "nll": nll, "kl_nats": kl, "tokens": ids.size,
    }  # fmt: skip


def child(options: argparse.Namespace, *contender: str) -> dict[str, object]:
    """Run one contender in a process of its own."""
    shape = ["--windows", str(options.windows), "--length", str(options.length), "--repeats", str(options.repeats)]
    done = subprocess.run(
        [sys.executable, __file__, str(options.base), str(options.variant), *shape, "--only", *contender],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **({"OMP_WAIT_POLICY": "PASSIVE"} if contender[0] == "ours" else {}), "HF_HUB_OFFLINE": "1"},
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the contenders in turn, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("variant", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    text, tokens = text_of(options.base, options.windows, options.length)
    if options.only:
        kind, *harness = options.only
        if kind == "harness":
            role, batch, dtype = harness
            model = options.base if role == "base" else options.variant
            found = time_harness(model, text, options.length, int(batch), dtype, options.repeats)
            name = f"lm-eval, {role}, {dtype}, batch {batch}"
            row = {"contender": name, "models": 1, "batch": int(batch), "tokens": tokens}
            print(json.dumps({**row, **found}))
        else:
            found = time_ours(options.base, options.variant, text, options.length, options.repeats)
            print(json.dumps({"contender": "gemma-pack, KL included", "models": 2, **found}))
        return
    rows = [child(options, "harness", "base", str(batch), "bfloat16") for batch in options.batch]
    best = str(min(rows, key=lambda row: statistics.median(row["seconds"]))["batch"])  # type: ignore[type-var,arg-type]
    others = [("harness", "variant", best, "bfloat16"), ("harness", "base", best, "float32"), ("ours",)]
    rows += [child(options, *contender) for contender in others]
    for row in rows:
        row["tokens_per_second"] = [row["tokens"] / second for second in row["seconds"]]  # type: ignore[operator,attr-defined]
        row["median_tokens_per_second"] = statistics.median(row["tokens_per_second"])  # type: ignore[type-var]
    header = ["contender", "models", "tokens", "tokens/s", "least", "most"]
    print(table([
        [str(row["contender"]), str(row["models"]), str(row["tokens"]), f"{row['median_tokens_per_second']:.0f}",
         f"{min(row['tokens_per_second']):.0f}", f"{max(row['tokens_per_second']):.0f}"]  # type: ignore[call-overload]
        for row in rows
    ], header=header))  # fmt: skip
    made = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "variant": options.variant.name,
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "rows": rows,
    }
    name = f"scoring-{options.variant.name.rpartition('.')[2]}.json"
    (RESULTS / name).write_text(json.dumps(made, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
