"""The benchmarks of Google's model card of Gemma 2 as lm-evaluation-harness's tasks, with the card's shots and figures.

Source of labels, shots and figures: the tables "Benchmark Results" (pre-trained models) and "Ethics and Safety"
(instruction-tuned models) of https://ai.google.dev/gemma/docs/core/model_card_2. Google's prompts are not published, so
the harness's absolute figures differ from the card's; what quantization cost is the paired difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A row of the card.

    `shots` is None where the card names none and the harness's own count holds. `folders` are those below the harness's
    `tasks` that define the task: reading them alone takes a second, reading all of them half a minute.
    """

    label: str
    task: str
    metric: str
    folders: tuple[str, ...]
    shots: int | None
    published: tuple[float, float]
    """Percent, of 9B and of 27B."""
    filter: str = "none"
    runs_code: bool = False
    """Whether scoring runs what the model wrote."""


GEMMA_CARD: Final = (
    Benchmark("MMLU", "mmlu", "acc", ("mmlu",), 5, (71.3, 75.2)),
    Benchmark("HellaSwag", "hellaswag", "acc_norm", ("hellaswag",), 10, (81.9, 86.4)),
    Benchmark("PIQA", "piqa", "acc_norm", ("piqa",), 0, (81.7, 83.2)),
    Benchmark("SocialIQA", "social_iqa", "acc", ("siqa",), 0, (53.4, 53.7)),
    Benchmark("BoolQ", "boolq", "acc", ("super_glue/boolq",), 0, (84.2, 84.8)),
    Benchmark("WinoGrande", "winogrande", "acc", ("winogrande",), None, (80.6, 83.7)),
    Benchmark("ARC-e", "arc_easy", "acc_norm", ("arc",), 0, (88.0, 88.6)),
    Benchmark("ARC-c", "arc_challenge", "acc_norm", ("arc",), 25, (68.4, 71.4)),
    Benchmark("TriviaQA", "triviaqa", "exact_match", ("triviaqa",), 5, (76.6, 83.7), "remove_whitespace"),
    Benchmark("Natural Questions", "nq_open", "exact_match", ("nq_open",), 5, (29.2, 34.5), "remove_whitespace"),
    Benchmark("HumanEval", "humaneval", "pass@1", ("humaneval",), None, (40.2, 51.8), "create_test", runs_code=True),
    Benchmark("MBPP", "mbpp", "pass_at_1", ("mbpp",), 3, (52.4, 62.6), runs_code=True),
    Benchmark("GSM8K", "gsm8k", "exact_match", ("gsm8k",), 5, (68.6, 74.0), "strict-match"),
    Benchmark("MATH", "minerva_math", "exact_match", ("benchmarks", "minerva_math"), 4, (36.6, 42.3)),
    Benchmark("AGIEval", "agieval_en", "acc", ("agieval",), None, (52.8, 55.1)),
    Benchmark("BIG-Bench", "bbh_cot_fewshot", "exact_match", ("bbh/cot_fewshot",), 3, (68.2, 74.9), "get-answer"),
)
SAFETY: Final = (
    Benchmark("CrowS-Pairs", "crows_pairs_english", "pct_stereotype", ("crows_pairs",), None, (37.47, 36.67)),
    Benchmark("BBQ Ambig", "bbq_ambig", "acc", ("bbq",), 1, (88.58, 85.99)),
    Benchmark("BBQ Disambig", "bbq_disambig", "acc", ("bbq",), None, (82.67, 86.94)),
    Benchmark("Winogender", "winogender_all", "acc", ("winogender",), None, (79.17, 77.22)),
    Benchmark("TruthfulQA", "truthfulqa_mc2", "acc", ("truthfulqa",), None, (50.27, 51.60)),
    Benchmark("Toxigen", "toxigen", "acc", ("toxigen",), None, (39.30, 38.42)),
)
"""RealToxicity is scored by a web service, and Winobias 1_2 and 2_2 are not among the harness's tasks."""

SUITES: Final = {"gemma-card": GEMMA_CARD, "safety": SAFETY}
