"""Greedy answers side by side: batches, divergence, near-ties, silence."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from gemma_pack.errors import QuantizationError
from gemma_pack.evaluation.engines.in_process import Model, load
from gemma_pack.evaluation.parity import compare_answers, first_divergent, repeats
from gemma_pack.evaluation.prompts import OPENINGS, QUESTIONS, Prompt, build_prompts
from gemma_pack.tokenizer import load_tokenizer
from tests.evaluation.conftest import noise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gemma_pack.console import Console
    from gemma_pack.report import Parity
    from gemma_pack.texts import Windows


@pytest.fixture(scope="session")
def base(trained: Path) -> Model:
    return load(trained, "base", "cpu")


@pytest.fixture(scope="session")
def decode(trained: Path) -> Callable[[Sequence[int]], str]:
    tokenizer, _ = load_tokenizer(trained)
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=False)


@pytest.fixture(scope="session")
def prompts(trained: Path, evaluation_windows: Windows) -> list[Prompt]:
    return build_prompts(trained, 6, evaluation_windows.ids)


def test_prompts_start_with_one_bos_and_take_turns(trained: Path, evaluation_windows: Windows) -> None:
    found = build_prompts(trained, 28, evaluation_windows.ids)
    assert [p.text for p in found[:4]] == [QUESTIONS[0], OPENINGS[0], QUESTIONS[1], OPENINGS[1]]
    assert [p.templated for p in found[:4]] == [True, False, True, False]
    assert all(p.ids[0] == 2 and p.ids.count(2) == 1 for p in found)
    assert len(found) == 28
    assert [len(p.ids) for p in found[24:]] == [32] * 4
    assert found[24].ids == tuple(evaluation_windows.ids[0, :32].tolist())


def test_without_a_chat_template_no_question_is_asked(
    trained: Path, evaluation_windows: Windows, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(trained / name)
    found = build_prompts(tmp_path, 14, evaluation_windows.ids)
    assert [p.text for p in found[:12]] == list(OPENINGS)
    assert not any(p.templated for p in found)


def test_padding_does_not_change_the_answers(base: Model, prompts: list[Prompt]) -> None:
    """In float32, where the shape of a batch does not decide between two tokens."""
    precise = Model(base.module.float(), "base", "sdpa")
    try:
        with torch.inference_mode():
            together = precise.answers([p.ids for p in prompts], 40)
            alone = [precise.answers([p.ids], 40)[0] for p in prompts]
        assert len({len(p.ids) for p in prompts}) > 1
        assert together == alone
    finally:
        base.module.bfloat16()


def test_answers_are_those_of_generate(base: Model, prompts: list[Prompt]) -> None:
    with torch.inference_mode():
        ours = base.answers([prompts[1].ids], 24)[0]
        theirs = base.module.generate(
            torch.tensor([prompts[1].ids]), max_new_tokens=24, do_sample=False, top_k=None, top_p=None
        )
    assert list(ours.tokens) == theirs[0, len(prompts[1].ids) :].tolist()


def compare(base: Model, variant: Model, prompts: list[Prompt], decode: object, reporter: Console) -> Parity:
    return compare_answers(base, variant, prompts, limit=16, decode=decode, reporter=reporter)  # type: ignore[arg-type]


def test_a_model_agrees_with_itself(base: Model, prompts: list[Prompt], decode: object, reporter: Console) -> None:
    parity = compare(base, base, prompts, decode, reporter)
    assert parity.identical_share == 1
    assert parity.divergent_share <= 0.05  # teacher forcing runs another kernel, and bf16 ties may fall differently
    assert all(p.first_divergent is None and not p.variant_empty and p.base == p.variant for p in parity.prompts)


def test_a_harmed_variant_parts_from_its_base(
    base: Model, make_variant: Callable[..., Path], prompts: list[Prompt], decode: object, reporter: Console
) -> None:
    variant = load(make_variant(noise(1.0)), "variant", "cpu")
    parity = compare(base, variant, prompts, decode, reporter)
    assert parity.identical_share < 1
    assert parity.divergent_share > 0.2
    for prompt in parity.prompts:
        if prompt.first_divergent is not None:
            assert prompt.base != prompt.variant or prompt.base_ended != prompt.variant_ended
            assert 0 <= prompt.first_divergent <= prompt.tokens


def test_silence_is_noticed(
    base: Model, trained: Path, prompts: list[Prompt], decode: object, reporter: Console
) -> None:
    mute = load(trained, "variant", "cpu")
    mute._ends = frozenset(range(512))  # every token ends its answer
    parity = compare(base, mute, prompts, decode, reporter)
    assert any(p.variant_empty for p in parity.prompts)
    for prompt in parity.prompts:
        assert (prompt.variant, prompt.variant_ended) == ("", True)
        assert prompt.variant_empty == bool(prompt.base.strip())
    both = compare(mute, mute, prompts, decode, reporter)
    assert not any(p.variant_empty for p in both.prompts)


def test_an_end_token_ends_one_answer_and_not_the_others(base: Model, prompts: list[Prompt]) -> None:
    with torch.inference_mode():
        free = base.answers([p.ids for p in prompts[:3]], 12)
        stop = free[0].tokens[4]
        kept, base._ends = base._ends, frozenset([stop])
        try:
            bound = base.answers([p.ids for p in prompts[:3]], 12)
        finally:
            base._ends = kept
    for before, after in zip(free, bound, strict=True):
        cut = before.tokens.index(stop) + 1 if stop in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:cut]
        assert after.ended == (stop in before.tokens)


def test_nan_while_answering_is_a_failure(trained: Path, prompts: list[Prompt]) -> None:
    broken = load(trained, "variant", "cpu")
    with torch.no_grad():
        broken.module.model.layers[2].self_attn.o_proj.weight.fill_(float("inf"))
    with pytest.raises(
        QuantizationError, match=r"variant computes NaN or infinity, first in model\.layers\.2\.self_attn"
    ):
        broken.answers([prompts[0].ids], 4)


@pytest.mark.parametrize(
    ("base_tokens", "variant_tokens", "expected"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [], None), ([], [1], 0)],
)
def test_where_answers_part(base_tokens: list[int], variant_tokens: list[int], expected: int | None) -> None:
    assert first_divergent(base_tokens, variant_tokens) == expected


def test_repetition_is_the_share_of_repeated_four_grams() -> None:
    assert repeats([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repeats([1] * 13) == pytest.approx(0.9)
    assert repeats([1, 2, 3]) == 0


class Fixed:
    """A model whose logits are given: three tokens are likely after anything."""

    def __init__(self, logits: list[float]) -> None:
        self.row = torch.tensor(logits)

    def answers(self, prompts: list[tuple[int, ...]], limit: int) -> list[object]:
        from gemma_pack.evaluation.engines.in_process import Answer

        return [Answer((int(self.row.argmax()),) * limit, ended=False) for _ in prompts]

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[..., None].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.row.repeat(len(hidden), 1)


@pytest.mark.parametrize(
    ("base_logits", "variant_logits", "near_tie"),
    [
        ([2.0, 1.8, 0, 0, 0, -9], [1.8, 2.0, 0, 0, 0, -9], True),
        ([2.0, 1.4, 0, 0, 0, -9], [1.8, 2.0, 0, 0, 0, -9], False),  # the base was sure
        ([2.0, 1.8, 0, 0, 0, -9], [-9, 2.0, 1, 1, 1, 1], False),  # the base's choice is out of the variant's top 5
    ],
)
def test_near_ties_are_forgiven_by_rule(
    base_logits: list[float], variant_logits: list[float], near_tie: bool, reporter: Console
) -> None:
    prompt = Prompt("p", (2, 7), templated=False)
    parity = compare_answers(
        Fixed(base_logits), Fixed(variant_logits), [prompt, replace(prompt)], limit=3, decode=str, reporter=reporter
    )  # type: ignore[arg-type]
    assert [p.near_tie for p in parity.prompts] == [near_tie] * 2
    assert parity.divergent_share == 1
    assert parity.prompts[0].first_divergent == 0
