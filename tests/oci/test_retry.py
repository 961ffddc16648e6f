from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.oci.retry import AnswerError, Patience, Retry


@given(st.integers(1, 60), st.none() | st.floats(0, 1e6))
def test_pauses_are_bounded_and_as_long_as_asked_for(attempt: int, asked_s: float | None):
    policy = Retry()
    pause_s = policy.pause_s(attempt, AnswerError("busy", status=429, retry_after_s=asked_s))
    if attempt >= policy.attempts or (asked_s or 0) > policy.patience_s:
        assert pause_s is None
    else:
        assert pause_s is not None
        assert (asked_s or 0) <= pause_s <= max(asked_s or 0, policy.cap_s)


def test_pauses_grow_up_to_a_cap():
    policy = Retry(attempts=20)
    for attempt, most_s in enumerate([1, 2, 4, 8, 16, 20, 20], 1):
        pauses = [policy.pause_s(attempt, AnswerError("broken")) or 0 for _ in range(200)]
        assert most_s / 4 <= min(pauses) <= max(pauses) <= most_s
        assert max(pauses) - min(pauses) > most_s / 4


def test_an_action_is_tried_until_it_succeeds_or_patience_ends():
    outcomes = iter([AnswerError("a"), AnswerError("b", status=503), "done"])

    def act() -> str:
        outcome = next(outcomes)
        if isinstance(outcome, AnswerError):
            raise outcome
        return outcome

    assert Patience(Retry(base_s=0)).run(act) == "done"
    outcomes = iter([AnswerError("a"), AnswerError("b"), "never"])
    with pytest.raises(AnswerError, match="b") as caught:
        Patience(Retry(base_s=0, attempts=2)).run(act)
    assert not caught.value.transient


@pytest.mark.parametrize(("status", "transient"), [(0, True), (429, True), (500, True), (400, False), (404, False)])
def test_only_what_may_pass_is_transient(status: int, transient: bool):
    assert AnswerError("x", status=status).transient is transient


def test_stopping_ends_a_long_pause_at_once():
    patience = Patience(Retry(base_s=60, cap_s=60))
    patience.stop.set()
    begin_s = time.monotonic()
    with pytest.raises(AnswerError):
        patience.pause(1, AnswerError("broken"))
    assert time.monotonic() - begin_s < 1


def test_only_a_pause_that_is_worth_it_is_told():
    told: list[str] = []
    patience = Patience(Retry(base_s=0).telling(told.append))
    patience.pause(1, AnswerError("broken"))
    assert told == []
    patience = Patience(Retry(base_s=0).telling(told.append))
    patience.pause(1, AnswerError("busy", status=503, retry_after_s=1.2))
    assert told == ["busy: trying again in 1 s"]
    patience.stop.set()
    with pytest.raises(AnswerError):
        patience.pause(1, AnswerError("busy", status=503, retry_after_s=1.2))
    with pytest.raises(AnswerError):
        patience.pause(9, AnswerError("busy", status=503, retry_after_s=1.2))
    assert len(told) == 1
