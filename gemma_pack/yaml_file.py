"""YAML that people write, such as recipes: read strictly, checked against a pydantic model, each mistake with its line.

Stricter than YAML itself: a key that stands twice, a date, and any tag but those of plain values are mistakes,
because each of them silently means something else than its author meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

M = TypeVar("M", bound=BaseModel)

_TAG_PREFIX: Final = "tag:yaml.org,2002:"
_PLAIN_TAGS: Final = frozenset({"str", "int", "float", "bool", "null", "seq", "map"})


def read_text(path: Path, *, hint: str, error: type[InvalidUsageError] = InvalidUsageError) -> str:
    """Return the text of a file that a user named; raise `error` with the reason where it cannot be read."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else "it is not UTF-8"
        raise error(f"cannot read {path}: {reason}", hint=hint) from cause


def parse_yaml(
    model: type[M],
    text: str,
    *,
    origin: str,
    hint: str,
    error: type[InvalidUsageError] = InvalidUsageError,
) -> M:
    """Return `text` as a `model`; `origin` names the file in errors, `hint` is their remedy.

    Raises:
        InvalidUsageError: or its subclass `error`; one line `file:line: key: mistake` for each mistake, in order.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as cause:
        line = text.count("\n", 0, cause.position) + 1
        raise error(f"{origin}:{line}: not YAML: {cause.reason}", hint=hint) from cause
    except yaml.MarkedYAMLError as cause:
        line = cause.problem_mark.line + 1 if cause.problem_mark else 1
        raise error(f"{origin}:{line}: not YAML: {cause.problem or cause.context}", hint=hint) from cause
    except RecursionError as cause:
        raise error(f"{origin}: nested too deeply", hint=hint) from cause
    if mistakes := list(_mistakes(root, set())):
        raise error("\n".join(f"{origin}:{line}: {sentence}" for line, sentence in sorted(mistakes)), hint=hint)
    if not isinstance(root, yaml.MappingNode):
        raise error(f"{origin}: this file is no mapping of keys to values", hint=hint)
    try:
        return model.model_validate(yaml.constructor.SafeConstructor().construct_document(root))
    except ValidationError as cause:
        found = [(line_of(root, e["loc"]), f"{'.'.join(map(str, e['loc']))}: {_sentence(e)}") for e in cause.errors()]
        lines = [f"{origin}:{line}: {sentence.removeprefix(': ')}" for line, sentence in sorted(found)]
        raise error("\n".join(lines), hint=hint) from cause


def line_of(node: yaml.Node | None, location: tuple[int | str, ...]) -> int:
    """Return the line, from 1, of the deepest node on the way from `node` to `location`."""
    line = node.start_mark.line if node else 0
    for step in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line
        else:
            break
    return line + 1


def _mistakes(node: yaml.Node | None, seen: set[int]) -> Iterator[tuple[int, str]]:
    """Find what YAML allows and a reader would not expect, as (line, sentence)."""
    if node is None or id(node) in seen:  # an alias stands for a node that has been checked
        return
    seen.add(id(node))
    line = node.start_mark.line + 1
    kind = node.tag.removeprefix(_TAG_PREFIX)
    if kind == "timestamp":
        yield line, f"{node.value} is a date in YAML; put it in quotes"
    elif kind not in _PLAIN_TAGS:
        yield line, f"{node.tag} is not allowed: plain values only"
    elif isinstance(node, yaml.ScalarNode):
        try:
            yaml.constructor.SafeConstructor().construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError):  # such as !!bool maybe, or an int of 5000 digits
            yield line, f"{node.value[:40]} is no {kind}"
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mistakes(value, seen)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            key_line = key.start_mark.line + 1
            if key.tag == f"{_TAG_PREFIX}merge":
                yield key_line, "<< is not allowed: plain keys only"
            elif key.tag != f"{_TAG_PREFIX}str":
                unless = f"; {key.value} is none unless it is in quotes" if isinstance(key, yaml.ScalarNode) else ""
                yield key_line, f"a key must be a word{unless}"
            elif key.value in names:
                yield key_line, f"{key.value} stands twice"
            else:
                names.add(key.value)
            yield from _mistakes(value, seen)


def _sentence(error: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "missing":
        return "is missing"
    given = "" if isinstance(error["input"], dict | list) else f", not {error['input']!r}"
    return f"{error['msg'].removeprefix('Value error, ')}{given}"
