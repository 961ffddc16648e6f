"""Small tasks of lm-evaluation-harness in files: a multiple choice, a generation and a rolled text, with their data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

QUESTIONS = [
    {"question": f"the weight of the {thing} is", "choices": ["the model", "error", "block"], "answer": number % 3}
    for number, thing in enumerate(["block", "scale", "layer", "model", "error", "weight", "block of the scale"])
]


def write_task(directory: Path, name: str, **changes: Any) -> str:
    """Write the task `name`, one of `choice`, `answer` and `page`, and its data; return the path of its YAML file."""
    directory.mkdir(exist_ok=True)
    data = directory / f"{name}.json"
    data.write_text("\n".join(json.dumps(row) for row in QUESTIONS), "utf-8")
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "{{question}}",
        "num_fewshot": 0,
        **_KINDS[name],
        **changes,
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task), "utf-8")
    return str(path)


_MEAN = {"aggregation": "mean", "higher_is_better": True}
_KINDS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", **_MEAN}, {"metric": "acc_norm", **_MEAN}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **_MEAN}],
    },
    "page": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} the weight of the model and the error",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}
