"""Greedy generation of both models side by side.

A number such as perplexity averages over tokens; a reader meets sentences. So both answer the same prompts greedily,
and the report counts identical answers, shows where the others part, and says how often the variant, fed the
base's own answer, would have chosen another token (standard divergent tokens, arXiv 2311.01544). An answer of white
space where the base had words is a hard failure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gemma_pack.report import Parity, PromptParity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from gemma_pack.console import Reporter
    from gemma_pack.evaluation.engines.in_process import Answer, Model
    from gemma_pack.evaluation.engines.reading import Reader, Reading
    from gemma_pack.evaluation.prompts import Prompt

BATCH: Final = 16
"""Prompts that are answered at once. Both models see the same batches."""
NEAR_TIE_TOP: Final = 5
NEAR_TIE_NATS: Final = 0.5
"""vLLM's rule for near-ties takes the top 5 (`check_logprobs_close`, tests/models/utils.py); that the base's own first
two lie within half a nat is asked besides."""
REPEAT_LENGTH: Final = 4


def compare_answers(
    base: Model,
    variant: Model,
    prompts: Sequence[Prompt],
    *,
    limit: int,
    decode: Callable[[Sequence[int]], str],
    reporter: Reporter,
) -> Parity:
    """Let both models answer `prompts` greedily with at most `limit` tokens and compare the answers.

    Raises:
        QuantizationError: a model computes NaN or infinity.
    """
    import torch

    compared: list[PromptParity] = []
    divergent = 0
    with torch.inference_mode(), reporter.progress("Comparing greedy answers", len(prompts)) as task:
        for begin in range(0, len(prompts), BATCH):
            batch = prompts[begin : begin + BATCH]
            ids = [prompt.ids for prompt in batch]
            pairs = zip(base.answers(ids, limit), variant.answers(ids, limit), strict=True)
            for prompt, (theirs, ours) in zip(batch, pairs, strict=True):
                result, count = _compare(base, variant, prompt, theirs, ours, decode=decode)
                compared.append(result)
                divergent += count
                task.advance()
    return _summarize(compared, divergent, limit)


def first_divergent(base: Sequence[int], variant: Sequence[int]) -> int | None:
    """Return the index of the first token that differs, or None where both answers are the same."""
    for index, (theirs, ours) in enumerate(zip(base, variant, strict=False)):
        if theirs != ours:
            return index
    return None if len(base) == len(variant) else min(len(base), len(variant))


def repeats(tokens: Sequence[int]) -> float:
    """Return the share of 4-grams that had occurred before: 1 - distinct-4."""
    grams = [tuple(tokens[i : i + REPEAT_LENGTH]) for i in range(len(tokens) - REPEAT_LENGTH + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _compare(
    base: Model,
    variant: Model,
    prompt: Prompt,
    theirs: Answer,
    ours: Answer,
    *,
    decode: Callable[[Sequence[int]], str],
) -> tuple[PromptParity, int]:
    """Return the comparison of two answers, and the number of divergent tokens under teacher forcing."""
    import torch

    forced = torch.tensor([[*prompt.ids, *theirs.tokens]])
    scored = slice(len(prompt.ids) - 1, -1)
    variant_logits = variant.logits(variant.hidden(forced)[0, scored])
    chosen = variant_logits.argmax(-1)
    divergent = int((chosen != torch.tensor(theirs.tokens, device=chosen.device)).sum())
    first = first_divergent(theirs.tokens, ours.tokens)
    near_tie = False
    if first is not None and first < min(len(theirs.tokens), len(ours.tokens)):
        base_logits = base.logits(base.hidden(forced)[0, scored][first : first + 1])[0]
        near_tie = _is_near_tie(base_logits, variant_logits[first], theirs.tokens[first], ours.tokens[first])
    return _describe(prompt, theirs, ours, first, divergent, near_tie=near_tie, decode=decode), divergent


def read_answers(reader: Reader, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[Reading]:
    """Return the reading of each answer after its prompt: what the model would have said at each place."""
    pairs = list(zip(prompts, answers, strict=True))
    readings = reader.read([[*prompt, *answer.tokens] for prompt, answer in pairs], NEAR_TIE_TOP)
    return [reading.last(len(answer.tokens)) for reading, answer in zip(readings, answers, strict=True)]


def compare_read_answers(
    prompts: Sequence[Prompt],
    base: Sequence[Answer],
    variant: Sequence[Answer],
    readings: Sequence[tuple[Reading, Reading]],
    *,
    limit: int,
    decode: Callable[[Sequence[int]], str],
) -> Parity:
    """Compare answers that are there, of at most `limit` tokens.

    `readings` are what base and variant, in this order, would have said at each place of the base's answer, with five
    tokens each. Up to the first divergent token both answers are the same, so its place is read the same way by both.
    """
    compared: list[PromptParity] = []
    divergent = 0
    for prompt, theirs, ours, (base_read, variant_read) in zip(prompts, base, variant, readings, strict=True):
        count = int((variant_read.top1 != base_read.ids).sum())
        first = first_divergent(theirs.tokens, ours.tokens)
        near_tie = False
        if first is not None and first < min(len(theirs.tokens), len(ours.tokens)):
            near_tie = (
                float(base_read.top_logprobs[first, 0] - base_read.top_logprobs[first, 1]) < NEAR_TIE_NATS
                and ours.tokens[first] in base_read.top_ids[first]
                and theirs.tokens[first] in variant_read.top_ids[first]
            )
        compared.append(_describe(prompt, theirs, ours, first, count, near_tie=bool(near_tie), decode=decode))
        divergent += count
    return _summarize(compared, divergent, limit)


def _summarize(compared: Sequence[PromptParity], divergent: int, limit: int) -> Parity:
    return Parity(
        limit=limit,
        identical_share=sum(prompt.first_divergent is None for prompt in compared) / len(compared),
        divergent_share=divergent / sum(prompt.tokens for prompt in compared),
        prompts=tuple(compared),
    )


def _describe(
    prompt: Prompt,
    theirs: Answer,
    ours: Answer,
    first: int | None,
    divergent: int,
    *,
    near_tie: bool,
    decode: Callable[[Sequence[int]], str],
) -> PromptParity:
    texts = [decode(answer.tokens[: len(answer.tokens) - answer.ended]) for answer in (theirs, ours)]
    return PromptParity(
        prompt=prompt.text,
        templated=prompt.templated,
        base=texts[0],
        variant=texts[1],
        tokens=len(theirs.tokens),
        first_divergent=first,
        near_tie=near_tie,
        divergent_share=divergent / len(theirs.tokens),
        variant_repeats=repeats(ours.tokens),
        base_ended=theirs.ended,
        variant_ended=ours.ended,
        variant_empty=bool(texts[0].strip()) and not texts[1].strip(),
    )


def _is_near_tie(base_logits: Tensor, variant_logits: Tensor, base_token: int, variant_token: int) -> bool:
    """Say whether two float32 logit vectors [vocabulary] made their different choices by a hair."""
    top = base_logits.topk(NEAR_TIE_TOP)
    close = float(top.values[0] - top.values[1]) < NEAR_TIE_NATS
    return (
        close
        and variant_token in top.indices.tolist()
        and base_token in variant_logits.topk(NEAR_TIE_TOP).indices.tolist()
    )
