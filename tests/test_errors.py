"""The error tree: what CI sees, and that the drawing of it tells the truth."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING

import pytest

from gemma_pack import errors
from gemma_pack.errors import GemmaPackError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_CODES = {
    "GemmaPackError": 1,
    "InvalidUsageError": 2,
    "RecipeError": 2,
    "CheckpointError": 1,
    "TextError": 1,
    "SourceError": 1,
    "QuantizationError": 1,
    "RegistryError": 1,
    "EngineError": 1,
    "GateFailedError": 10,
    "GateUndecidedError": 11,
    "MachineError": 12,
    "AccessError": 13,
    "OfflineError": 14,
    "UnusableImageError": 15,
}
"""A promise to every pipeline that reads them: a name or a code may be added here, never changed."""


def tree(root: type[GemmaPackError], depth: int = 0) -> Iterator[tuple[int, str, int]]:
    yield depth, root.__name__, root.exit_code
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


def test_exit_codes_are_the_promised_ones():
    assert {name: code for _, name, code in tree(GemmaPackError)} == EXIT_CODES


def test_the_drawing_in_the_docstring_is_the_tree():
    rows = re.findall(r"^ {4}([│├└─ ]*)(\w+Error) +(\d+) ", str(errors.__doc__), re.MULTILINE)
    drawn = [(len(branch) // 4, name, int(code)) for branch, name, code in rows]
    assert drawn == list(tree(GemmaPackError))


def test_only_the_gate_gives_a_verdict():
    assert {name for _, name, code in tree(GemmaPackError) if code in {10, 11}} == {
        "GateFailedError",
        "GateUndecidedError",
    }


def test_every_class_says_what_it_is_for():
    assert all(getattr(errors, name).__doc__ for name in EXIT_CODES)


def test_message_and_hint_survive_a_worker_process():
    error = pickle.loads(pickle.dumps(RecipeError("it is wrong", hint="mend it")))  # noqa: S301 - our own bytes
    assert (error.message, error.hint, str(error), error.exit_code) == ("it is wrong", "mend it", "it is wrong", 2)


def test_a_recipe_error_is_caught_as_wrong_usage():
    with pytest.raises(errors.InvalidUsageError):
        raise RecipeError("it is wrong")


class OutOfMemoryError(RuntimeError):
    """Of the name that torch gives to its own."""


@pytest.mark.parametrize(
    ("error", "code"),
    [(RecipeError("a line"), 2), (OutOfMemoryError("CUDA"), 12), (MemoryError(), 12), (OSError(5, "I/O error"), 1)],
)
def test_what_a_user_can_act_on_is_known(error: Exception, code: int) -> None:
    known = errors.known_error(error)
    assert known
    assert known.exit_code == code


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), AssertionError("x")])
def test_a_fault_of_ours_is_not(error: Exception) -> None:
    assert errors.known_error(error) is None
