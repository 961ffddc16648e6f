"""Benchmark tasks on base and variant, paired item by item.

Two accuracies say little: they differ by luck, and stay the same while answers change. Over the same items, the
difference has a bound, the answers that changed (flips, arXiv 2407.09141) are counted, and the smallest difference that
so many items could have shown stands beside it. With n items, right or wrong, of which g were gained and l lost:

    D = (g - l) / (n + 2),  SE = sqrt(((g + l + 2) / (n + 2) - D²) / (n + 2)),  bounds D ± z SE

(adjusted Wald; Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on
Paired Data", 2012), which is no point where nothing flipped. Other scores: Student's t on the differences. The
detectable difference is (z_0.975 + z_0.8) sqrt(mean d² / n) (arXiv 2605.28873, after Miettinen).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gemma_pack.disk import write_atomic
from gemma_pack.errors import (
    AccessError,
    GemmaPackError,
    InvalidUsageError,
    MachineError,
    OfflineError,
    SourceError,
)
from gemma_pack.evaluation.statistics import CONFIDENCE, student_quantile
from gemma_pack.evaluation.suites import SUITES, Benchmark
from gemma_pack.task_results import TASKS_DIRECTORY, SkippedTask, TaskReport, TaskResult, TaskScores
from gemma_pack.text_sources import hub_offline
from gemma_pack.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import numpy.typing as npt

    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.engines.reading import Reader
    from gemma_pack.task_results import ItemScores

    Floats = npt.NDArray[np.float64]

POWER: Final = 0.8
LEVEL: Final = 0.05
"""Two-sided, of the detectable difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskChoice:
    """Which tasks are run, on how much of them, and where what they find is kept."""

    names: tuple[str, ...] = ()
    """Names of the harness's tasks and groups, or paths of YAML files that define some."""
    suite: str | None = None
    limit: int | None = None
    """Items of each task at most."""
    kept: Path
    """A directory for the scores of each task and model, so that an interrupted run goes on."""
    items: Path
    """A directory for the items of both models side by side."""
    offline: bool = False

    def require_known(self) -> None:
        """Raise InvalidUsageError for a named task that the harness does not have, before anything is measured."""
        import lm_eval.tasks

        names = [wanted.name for wanted in _wanted(self) if not (wanted.benchmark or Path(wanted.name).is_file())]
        known = lm_eval.tasks.TaskManager().all_tasks if names else ()
        for name in names:
            if name not in known:
                raise _unknown(name)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One task to run: of a suite with its row, or alone."""

    name: str
    benchmark: Benchmark | None = None

    @property
    def label(self) -> str:
        return self.benchmark.label if self.benchmark else Path(self.name).stem

    @property
    def file_name(self) -> str:
        """Of the file with its items."""
        return f"{self.label.replace('/', '-').replace(' ', '-')}.jsonl"


def require_harness() -> None:
    """Raise MachineError where lm-evaluation-harness is not installed."""
    try:
        importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise MachineError(
            "tasks need lm-evaluation-harness, and it is not installed", hint="pip install 'gemma-pack[tasks]'"
        ) from error


def run_tasks(
    choice: TaskChoice, reader: Reader, *, key: str, directory: Path, reporter: Reporter
) -> dict[str, TaskScores | SkippedTask]:
    """Run every task on one model and return its scores by the task's label.

    Args:
        choice: the tasks.
        reader: the model.
        key: tells the weights and the engine of one model from those of others.
        directory: has the model's tokenizer.
        reporter: told of progress.

    Raises:
        InvalidUsageError: there is no such task, or it cannot be compared.
        OfflineError, AccessError, SourceError: the data of a task that was named is out of reach. Of a suite it is
            skipped, and the report says so.
    """
    tokenizer, bos = load_tokenizer(directory)
    found: dict[str, TaskScores | SkippedTask] = {}
    choice.kept.mkdir(parents=True, exist_ok=True)
    for wanted in _wanted(choice):
        benchmark = wanted.benchmark
        shots = benchmark.shots if benchmark else None
        asked = f"{key} {wanted.name} {shots} {choice.limit} {_content(wanted.name)}"
        name = hashlib.sha256(asked.encode()).hexdigest()[:24]
        path = choice.kept / f"{name}.json"
        if path.exists():
            found[wanted.label] = TaskScores.model_validate_json(path.read_bytes())
            continue
        try:
            loaded = _load(wanted, offline=choice.offline)
        except GemmaPackError as error:
            if benchmark is None:
                raise
            found[wanted.label] = SkippedTask(label=wanted.label, reason=error.message)
            reporter.warn(f"{wanted.label} is skipped: {error.message}")
            continue
        from gemma_pack.evaluation.harness import run_task

        scores = run_task(
            wanted.name,
            loaded,
            reader,
            tokenizer,
            bos,
            shots=shots,
            limit=choice.limit,
            reporter=reporter,
        )
        write_atomic(path, scores.model_dump_json())
        found[wanted.label] = scores
    return found


def compare_tasks(
    choice: TaskChoice,
    base: dict[str, TaskScores | SkippedTask],
    variant: dict[str, TaskScores | SkippedTask],
) -> TaskReport:
    """Pair what both models scored; write the items side by side, a file a task."""
    choice.items.mkdir(parents=True, exist_ok=True)
    results: list[TaskResult] = []
    skipped: list[SkippedTask] = []
    for wanted in _wanted(choice):
        theirs, ours = base[wanted.label], variant[wanted.label]
        if isinstance(theirs, TaskScores) and isinstance(ours, TaskScores):
            found = _pair(wanted, theirs, ours, choice.items)
            results += found
            if not found:
                skipped.append(SkippedTask(label=wanted.label, reason="none of its metrics is a number of each item"))
        else:
            skipped.append(theirs if isinstance(theirs, SkippedTask) else ours)  # type: ignore[arg-type]  # one of them
    return TaskReport(
        suite=choice.suite,
        limit=choice.limit,
        harness=f"lm-eval {importlib.metadata.version('lm-eval')}",
        results=tuple(results),
        skipped=tuple(skipped),
    )


def _pair(wanted: _Wanted, base: TaskScores, variant: TaskScores, items: Path) -> list[TaskResult]:
    if base.prompts_sha256 != variant.prompts_sha256:
        raise GemmaPackError(
            f"base and variant were asked different questions of {wanted.label}",
            hint="a task that draws at random cannot be paired: fix its seed",
        )
    both = {(scores.metric, scores.filter): (scores, None) for scores in base.metrics}
    paired = [(both[scores.metric, scores.filter][0], scores) for scores in variant.metrics]
    if wanted.benchmark:
        chosen = (wanted.benchmark.metric, wanted.benchmark.filter)
        paired = [(theirs, ours) for theirs, ours in paired if (ours.metric, ours.filter) == chosen]
    name = wanted.file_name
    rows = [
        {"item": item, "metric": ours.metric, "filter": ours.filter, "base": score, "variant": ours.scores[item]}
        for theirs, ours in paired
        for item, score in theirs.scores.items()
    ]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_atomic(items / name, data)
    digest = hashlib.sha256(data).hexdigest()
    return [
        compare_items(
            wanted.name,
            wanted.label,
            theirs,
            ours,
            benchmark=wanted.benchmark,
            file=f"{TASKS_DIRECTORY}/{name}",
            digest=digest,
        )
        for theirs, ours in paired
    ]


def compare_items(
    task: str,
    label: str,
    base: ItemScores,
    variant: ItemScores,
    *,
    benchmark: Benchmark | None = None,
    file: str,
    digest: str,
) -> TaskResult:
    """Return the paired result of one metric over the items that both models answered."""
    names = sorted(base.scores)
    theirs, ours = (np.array([side.scores[name] for name in names]) for side in (base, variant))
    interval = paired_interval(theirs, ours)
    right_or_wrong = bool(np.isin(np.concatenate([theirs, ours]), (0, 1)).all())
    recovers = variant.higher_is_better and theirs.mean() > 0
    return TaskResult(
        task=task,
        label=label,
        metric=variant.metric,
        filter=variant.filter,
        shots=variant.shots,
        items=len(names),
        base=float(theirs.mean()),
        variant=float(ours.mean()),
        difference=float((ours - theirs).mean()),
        lower=interval.lower,
        upper=interval.upper,
        detectable=interval.detectable,
        recovery_percent=100 * float(ours.mean() / theirs.mean()) if recovers else None,
        gained=int((ours > theirs).sum()) if right_or_wrong else None,
        lost=int((ours < theirs).sum()) if right_or_wrong else None,
        higher_is_better=variant.higher_is_better,
        published=dict(zip(("9B", "27B"), benchmark.published, strict=True)) if benchmark else {},
        items_file=file,
        items_sha256=digest,
    )


@dataclass(frozen=True, slots=True)
class Interval:
    """One-sided bounds of a mean difference, and the smallest difference that so many items could have shown."""

    lower: float
    upper: float
    detectable: float


def paired_interval(base: Floats, variant: Floats) -> Interval:
    """Return the bounds of the mean of variant - base, each float64 [items]."""
    difference = variant - base
    count = len(difference)
    if np.isin(base, (0, 1)).all() and np.isin(variant, (0, 1)).all():
        flips = (float(np.abs(difference).sum()) + 2) / (count + 2)
        centre = float(difference.sum()) / (count + 2)
        error = math.sqrt((flips - centre**2) / (count + 2))
        quantile, spread, count = NormalDist().inv_cdf(CONFIDENCE), flips, count + 2
    elif count > 1:
        centre, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(count)
        quantile, spread = student_quantile(CONFIDENCE, count - 1), float(np.mean(np.square(difference)))
    else:
        return Interval(-math.inf, math.inf, math.inf)
    z = NormalDist().inv_cdf(1 - LEVEL / 2) + NormalDist().inv_cdf(POWER)
    return Interval(centre - quantile * error, centre + quantile * error, z * math.sqrt(spread / count))


def _wanted(choice: TaskChoice) -> list[_Wanted]:
    suite = [_Wanted(benchmark.task, benchmark) for benchmark in SUITES[choice.suite]] if choice.suite else []
    wanted = [*suite, *(_Wanted(name) for name in choice.names)]
    for one, other in itertools.combinations(wanted, 2):
        if one.file_name == other.file_name:
            raise InvalidUsageError(
                f"{one.name} and {other.name} are both called {other.label} in the report",
                hint="give one of the YAML files another name, or run them one after the other",
            )
    return wanted


def _unknown(name: str) -> InvalidUsageError:
    return InvalidUsageError(
        f"the harness has no task {name}", hint="lm-eval ls tasks lists them; or give the path of a YAML file"
    )


def _content(name: str) -> str:
    path = Path(name)
    return path.read_text("utf-8") if path.is_file() else ""


def _load(wanted: _Wanted, *, offline: bool) -> dict[str, Any]:
    """Return the harness's own description of a task or group, with its data.

    A YAML file may name Python functions beside it, which the harness runs: it is code of the user's own.
    """
    import datasets
    import lm_eval.tasks

    datasets.disable_progress_bars()
    benchmark = wanted.benchmark
    if benchmark and benchmark.runs_code and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise InvalidUsageError(
            f"{benchmark.label} runs code that the model wrote",
            hint="set HF_ALLOW_CODE_EVAL=1 where nothing can be harmed, such as in a container",
        )
    folders = [Path(lm_eval.tasks.__file__).parent / folder for folder in benchmark.folders] if benchmark else []
    alone = bool(folders) or Path(wanted.name).is_file()
    manager = lm_eval.tasks.TaskManager(include_defaults=not alone, include_path=[str(folder) for folder in folders])
    try:
        with hub_offline() if offline else nullcontext():
            loaded: dict[str, Any] = manager.load([wanted.name])
    except KeyError as error:
        raise _unknown(wanted.name) from error
    except ConnectionError as error:
        raise OfflineError(
            f"the data of {wanted.name} is out of reach and not in the cache",
            hint="run it once with the network, or name a YAML file of your own",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        kind = AccessError if "gated" in reason else SourceError
        raise kind(f"the data of {wanted.name} cannot be loaded: {reason}") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise InvalidUsageError(
                f"{wanted.name} runs code that the model wrote",
                hint="set HF_ALLOW_CODE_EVAL=1 where nothing can be harmed, such as in a container",
            )
    return loaded
