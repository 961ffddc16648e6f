"""What is tried again, and how patiently: errors of a registry that may pass, and the pauses between tries."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from gemma_pack.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

TRANSIENT: Final = frozenset({408, 429, 500, 502, 503, 504})
"""What a registry, or a proxy before it, may answer for a moment."""
PROGRESS_BYTES: Final = 1 << 20
"""A try that got a blob this much further does not use up patience."""
WORTH_TELLING_S: Final = 1.0
"""A pause from which on the user hears why nothing moves."""


class AnswerError(RegistryError):
    """The registry answered with an error; `status` is 0 where the connection broke before an answer."""

    def __init__(
        self, message: str, *, status: int = 0, hint: str | None = None, retry_after_s: float | None = None
    ) -> None:
        """Keep what decides whether, when and how to try again."""
        super().__init__(message, hint=hint)
        self.status = status
        self.retry_after_s = retry_after_s
        self.final = False
        """Patience has ended: it was tried often enough."""

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed a little later."""
        return not self.final and (self.status == 0 or self.status in TRANSIENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often to try, and for how long to wait in between: exponential backoff with jitter, bounded.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    attempts: int = 6
    base_s: float = 0.5
    cap_s: float = 20.0
    patience_s: float = 300.0
    """The longest Retry-After that is waited for."""
    tell: Callable[[str], None] = lambda _: None
    """Hears why, and for how long, it waits."""

    def telling(self, tell: Callable[[str], None]) -> Retry:
        """Return the same patience, of which `tell` hears."""
        return replace(self, tell=tell)

    def pause_s(self, attempt: int, error: AnswerError) -> float | None:
        """Return the pause between try number `attempt`, from 1, and the next; None where there is no next one."""
        asked_s = error.retry_after_s or 0.0
        if attempt >= self.attempts or asked_s > self.patience_s:
            return None
        most_s = min(self.cap_s, self.base_s * 2**attempt)
        return max(asked_s, random.uniform(most_s / 4, most_s))  # noqa: S311 - spreads clients, guards nothing


class Patience:
    """Waits by a policy for one transfer, whose threads share it; `stop` ends all waiting at once."""

    def __init__(self, policy: Retry | None = None) -> None:
        """Start with nothing tried."""
        self.policy = policy or Retry()
        self.stop = threading.Event()
        """Set when another thread failed, or the user interrupted; whoever works obeys at the next piece."""

    def pause(self, attempt: int, error: AnswerError) -> None:
        """Wait before the try after `attempt`; raise `error` where there is none."""
        pause_s = self.policy.pause_s(attempt, error)
        error.final = pause_s is None
        if pause_s is None:
            raise error
        if pause_s >= WORTH_TELLING_S and not self.stop.is_set():
            self.policy.tell(f"{error}: trying again in {pause_s:.0f} s")
        if self.stop.wait(pause_s):
            raise error

    def run(self, action: Callable[[], T]) -> T:
        """Return what `action` returns, trying again after each transient error."""
        attempt = 1
        while True:
            try:
                return action()
            except AnswerError as error:
                if not error.transient:
                    raise
                self.pause(attempt, error)
            attempt += 1
