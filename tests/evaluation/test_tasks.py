"""Tasks on both models: the right tokens are asked, items are paired, and the statistics say what can be known."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gemma_pack.build import TaskNames, validate_variant
from gemma_pack.errors import InvalidUsageError, OfflineError
from gemma_pack.evaluation import profiles
from gemma_pack.evaluation.engines.in_process import load
from gemma_pack.evaluation.engines.reading import ResidentReader
from gemma_pack.evaluation.profiles import Profile
from gemma_pack.evaluation.suites import GEMMA_CARD, SAFETY, SUITES, Benchmark
from gemma_pack.evaluation.tasks import TaskChoice, compare_items, paired_interval, run_tasks
from gemma_pack.report import Engine
from gemma_pack.task_results import ItemScores, SkippedTask, TaskScores
from gemma_pack.tokenizer import load_tokenizer
from tests.evaluation.conftest import noise
from tests.evaluation.task_files import QUESTIONS, write_task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gemma_pack.console import Console
    from gemma_pack.evaluation.engines.reading import Reading

BOS = 2


class Listening(ResidentReader):
    """A reader that remembers what it was asked."""

    def __init__(self, directory: Path) -> None:
        engine = Engine(name="transformers", versions={}, device="cpu", attention="sdpa")
        super().__init__(load(directory, "base", "cpu"), lambda _: engine)
        self.sequences: list[list[int]] = []

    def read(self, sequences: Sequence[Sequence[int]], k: int, done: Any = lambda *_: None) -> list[Reading]:
        self.sequences += [list(sequence) for sequence in sequences]
        return super().read(sequences, k, done)

    def answers(self, prompts: Sequence[Sequence[int]], limit: int) -> Any:
        self.sequences += [list(prompt) for prompt in prompts]
        return super().answers(prompts, limit)


@pytest.fixture
def reader(trained: Path) -> Listening:
    return Listening(trained)


@pytest.fixture
def run(
    reader: Listening, trained: Path, tmp_path: Path, reporter: Console
) -> Callable[..., dict[str, TaskScores | SkippedTask]]:
    def run_on(*names: str, **options: Any) -> dict[str, TaskScores | SkippedTask]:
        choice = TaskChoice(names=names, kept=tmp_path / "kept", items=tmp_path / "items", **options)
        return run_tasks(choice, reader, key="base", directory=trained, reporter=reporter)

    return run_on


def scores_of(found: dict[str, TaskScores | SkippedTask], label: str, metric: str) -> dict[str, float]:
    task = found[label]
    assert isinstance(task, TaskScores)
    [scores] = [item.scores for item in task.metrics if item.metric == metric]
    return scores


def test_a_choice_is_the_likeliest_of_the_continuations(
    run: Callable[..., dict[str, TaskScores | SkippedTask]], reader: Listening, trained: Path, tmp_path: Path
) -> None:
    found = scores_of(run(write_task(tmp_path / "tasks", "choice")), "choice", "acc")
    tokenizer, _ = load_tokenizer(trained)
    for number, question in enumerate(QUESTIONS):
        likelihoods = []
        for choice in question["choices"]:
            context = tokenizer.encode(question["question"], add_special_tokens=False).ids
            whole = tokenizer.encode(f"{question['question']} {choice}", add_special_tokens=False).ids
            [reading] = ResidentReader.read(reader, [[BOS, *whole]], 1)
            likelihoods.append(-reading.nll[len(context) :].sum())
        assert found[f"choice/{number}"] == float(int(np.argmax(likelihoods)) == question["answer"])


@pytest.mark.parametrize("kind", ["choice", "answer", "page"])
@pytest.mark.parametrize("prefix", ["", "<bos>"])
def test_every_request_has_exactly_one_bos(
    run: Callable[..., dict[str, TaskScores | SkippedTask]], reader: Listening, tmp_path: Path, kind: str, prefix: str
) -> None:
    text = {"page": "doc_to_target"}.get(kind, "doc_to_text")
    run(write_task(tmp_path / "tasks", kind, **{text: prefix + "{{question}}"}))
    assert len(reader.sequences) >= len(QUESTIONS)
    assert {(sequence[0], sequence.count(BOS)) for sequence in reader.sequences} == {(BOS, 1)}


def test_a_long_text_is_read_in_windows_that_each_begin_with_bos_and_every_token_once(
    run: Callable[..., dict[str, TaskScores | SkippedTask]], reader: Listening, trained: Path, tmp_path: Path
) -> None:
    reader.max_length = 16
    target = "{{question}} " + "the weight of the model is by this block " * 4
    run(write_task(tmp_path / "tasks", "page", doc_to_target=target))
    assert {len(sequence) <= 16 for sequence in reader.sequences} == {True}
    assert all(sequence.count(BOS) == 1 and sequence[0] == BOS for sequence in reader.sequences)
    tokenizer, _ = load_tokenizer(trained)
    texts = [target.replace("{{question}}", str(question["question"])) for question in QUESTIONS]
    read = [token for sequence in reader.sequences for token in sequence[1:]]
    assert read == [t for text in texts for t in tokenizer.encode(text, add_special_tokens=False).ids]


def test_examples_come_before_the_question_and_a_long_context_keeps_bos_and_its_end(
    run: Callable[..., dict[str, TaskScores | SkippedTask]], reader: Listening, tmp_path: Path
) -> None:
    path = write_task(tmp_path / "tasks", "choice", num_fewshot=3)
    found = run(path)["choice"]
    assert isinstance(found, TaskScores)
    assert {scores.shots for scores in found.metrics} == {3}
    whole = [list(sequence) for sequence in reader.sequences]
    reader.sequences.clear()
    reader.max_length = 20
    run(path, limit=7)
    assert max(map(len, whole)) > 20
    for sequence, full in zip(reader.sequences, whole, strict=True):
        assert len(sequence) <= 20
        assert sequence[0] == BOS
        assert sequence[1:] == full[-len(sequence) + 1 :]


def test_an_answer_ends_where_the_task_says(
    run: Callable[..., dict[str, TaskScores | SkippedTask]], reader: Listening, trained: Path, tmp_path: Path
) -> None:
    tokenizer, _ = load_tokenizer(trained)
    prompt = [BOS, *tokenizer.encode("the weight of the block is", add_special_tokens=False).ids]
    [answer] = ResidentReader.answers(reader, [prompt], 6)
    text = tokenizer.decode(list(answer.tokens), skip_special_tokens=True)
    head = text[: len(text) // 2]
    target = {"doc_to_target": head, "doc_to_text": "the weight of the block is"}
    until = {"until": [text[len(head) :]], "max_gen_toks": 6, "do_sample": False}
    path = write_task(tmp_path / "tasks", "answer", **target, generation_kwargs=until)
    assert set(scores_of(run(path), "answer", "exact_match").values()) == {1.0}


def test_sampled_answers_are_refused(run: Callable[..., object], tmp_path: Path) -> None:
    sampled = {"until": ["\n"], "do_sample": True, "temperature": 0.7}
    with pytest.raises(InvalidUsageError, match="samples its answers"):
        run(write_task(tmp_path / "tasks", "answer", generation_kwargs=sampled))


def test_two_files_of_one_name_are_refused(run: Callable[..., object], tmp_path: Path) -> None:
    paths = [write_task(tmp_path / name, "choice") for name in ("a", "b")]
    with pytest.raises(InvalidUsageError, match="are both called choice"):
        run(*paths)


def test_a_task_alone_and_in_a_suite_with_examples_are_two(
    run: Callable[..., dict[str, TaskScores | SkippedTask]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_task(tmp_path / "tasks", "choice")
    monkeypatch.setitem(SUITES, "three", (Benchmark("Chosen", path, "acc", ("choice",), 3, (1, 2)),))
    found = run(path, suite="three")
    with_examples, alone = found["Chosen"], found["choice"]
    assert isinstance(with_examples, TaskScores)
    assert isinstance(alone, TaskScores)
    assert with_examples.prompts_sha256 != alone.prompts_sha256


def test_a_task_that_is_nowhere_is_refused(run: Callable[..., object], tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("task: wrong\ndataset_path: nobody/nothing\noutput_type: generate_until\ntest_split: test\n")
    with pytest.raises(OfflineError, match="out of reach"):
        run(str(path), offline=True)


def test_what_a_model_wrote_is_not_run_unasked(
    run: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(InvalidUsageError, match="runs code that the model wrote"):
        run(write_task(tmp_path / "tasks", "answer", unsafe_code=True))


def test_of_a_suite_what_cannot_be_run_is_named(
    run: Callable[..., dict[str, TaskScores | SkippedTask]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    suite = (
        Benchmark("HumanEval", "humaneval", "pass@1", ("humaneval",), None, (1, 2), runs_code=True),
        Benchmark("ARC-e", "arc_easy", "acc", ("arc",), 0, (1, 2)),
    )
    monkeypatch.setitem(SUITES, "small", suite)
    found = run(suite="small", offline=True)
    reasons = {label: task.reason for label, task in found.items() if isinstance(task, SkippedTask)}
    assert "runs code that the model wrote" in reasons["HumanEval"]
    assert "arc_easy" in reasons["ARC-e"]


def test_the_suites_name_tasks_of_the_harness() -> None:
    import lm_eval.tasks

    root = lm_eval.tasks.__path__[0]
    wanted = [*GEMMA_CARD, *SAFETY]
    folders = sorted({f"{root}/{folder}" for benchmark in wanted for folder in benchmark.folders})
    known = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders).all_tasks
    assert [benchmark.task for benchmark in wanted if benchmark.task not in known] == []
    assert len(GEMMA_CARD) == 16
    assert all(0 < nine < 100 and 0 < larger < 100 for nine, larger in (b.published for b in wanted))


def scores(values: Sequence[float], *, higher_is_better: bool = True) -> ItemScores:
    items = {f"t/{number}": float(value) for number, value in enumerate(values)}
    return ItemScores(metric="acc", filter="none", higher_is_better=higher_is_better, shots=0, scores=items)


def test_known_answer() -> None:
    """100 items, 80 right in the base; the variant loses 6 of them and gains 2."""
    base = [1] * 80 + [0] * 20
    variant = [0] * 6 + [1] * 74 + [1] * 2 + [0] * 18
    result = compare_items("t", "T", scores(base), scores(variant), file="f", digest="0" * 64)
    assert (result.base, result.variant, result.gained, result.lost) == (0.8, 0.76, 2, 6)
    assert result.difference == pytest.approx(-0.04)
    assert result.recovery_percent == pytest.approx(95)
    centre, error = -4 / 102, math.sqrt((10 / 102 - (4 / 102) ** 2) / 102)
    assert result.lower == pytest.approx(centre - 1.644854 * error, rel=1e-5)
    assert result.upper == pytest.approx(centre + 1.644854 * error, rel=1e-5)
    assert result.detectable == pytest.approx((1.959964 + 0.841621) * math.sqrt(10 / 102 / 102), rel=1e-5)


def test_equal_answers_leave_room_for_a_loss_that_was_not_seen() -> None:
    few, many = (paired_interval(np.ones(count), np.ones(count)) for count in (20, 2000))
    assert few.lower < -0.05
    assert few.lower < many.lower < 0 < many.upper < few.upper
    assert many.detectable < few.detectable


def test_less_is_better_has_no_recovery_and_scores_beyond_right_and_wrong_have_no_flips() -> None:
    result = compare_items(
        "t", "T", scores([0.5, 0.25, 1]), scores([0.5, 0.5, 1], higher_is_better=False), file="f", digest="0" * 64
    )
    assert (result.recovery_percent, result.gained, result.lost) == (None, None, None)
    assert result.lower < result.difference < result.upper


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    truth, below, above = -0.02, 0, 0
    for _ in range(1000):
        drawn = generator.choice(3, size=300, p=[0.05, 0.03, 0.92])  # lost, gained, the same
        base = np.where(drawn == 0, 1, 0).astype(float)
        interval = paired_interval(base, np.where(drawn == 1, 1, 0).astype(float))
        below += interval.upper < truth
        above += interval.lower > truth
    assert below / 1000 < 0.065
    assert above / 1000 < 0.065


def test_a_validation_with_tasks_keeps_every_item(
    make_variant: Callable[..., Path],
    trained: Path,
    tmp_path: Path,
    reporter: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(profiles.PROFILES, "tiny", Profile("tiny", 8, 48, 1, 4))
    path = write_task(tmp_path / "tasks", "choice")
    report = validate_variant(
        make_variant(noise(0.5)),
        tmp_path / "report",
        against=str(trained),
        profile_name="tiny",
        text="builtin",
        device="cpu",
        tasks=TaskNames(names=(path,), limit=5),
        reporter=reporter,
    )
    assert report.tasks is not None
    assert report.tasks.harness.startswith("lm-eval 0.4.")
    assert [(result.label, result.metric, result.items) for result in report.tasks.results] == [
        ("choice", "acc", 5),
        ("choice", "acc_norm", 5),
    ]
    file = tmp_path / "report" / report.tasks.results[0].items_file
    assert hashlib.sha256(file.read_bytes()).hexdigest() == report.tasks.results[0].items_sha256
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    accuracy = [row for row in rows if row["metric"] == "acc"]
    assert np.mean([row["variant"] for row in accuracy]) == pytest.approx(report.tasks.results[0].variant)
    assert not (tmp_path / "report.partial").exists()
    assert "| choice | acc | 0 | 5 |" in (tmp_path / "report" / "report.md").read_text()
    assert "<td>choice</td><td>acc</td>" in (tmp_path / "report" / "report.html").read_text()
    assert "choice acc" in (tmp_path / "report" / "junit.xml").read_text()
