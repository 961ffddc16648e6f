"""YAML with line numbers: every mistake is found, at its line, and nothing but its own error ever comes out."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from gemma_pack.errors import InvalidUsageError, RecipeError
from gemma_pack.yaml_file import line_of, parse_yaml


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: Annotated[int, Field(ge=1)]


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    parts: list[Part] = []
    share: float | None = None
    dry: bool | None = None


def parse(text: str) -> Document:
    return parse_yaml(Document, text, origin="a.yaml", hint="look at b.yaml", error=RecipeError)


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert caught.value.hint == "look at b.yaml"
    return caught.value.message


def test_a_sound_document_with_comments_and_anchors():
    text = "# why\nname: &n a  # because\nparts:\n  - &p {count: 1}\n  - *p\nshare: 1.0e+9\ndry: yes\n"
    assert parse(text) == Document(name="a", parts=[Part(count=1), Part(count=1)], share=1e9, dry=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.yaml: this file is no mapping of keys to values"),
        ("- name\n", "a.yaml: this file is no mapping of keys to values"),
        ("name: [a\n", "a.yaml:2: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("name: a\n\tparts: []\n", "a.yaml:2: not YAML: found character '\\t' that cannot start any token"),
        ("name: a\n---\nname: b\n", "a.yaml:2: not YAML: but found another document"),
        ("name: a\n\n# \x07\n", "a.yaml:3: not YAML: special characters are not allowed"),
        ("name: *other\n", "a.yaml:1: not YAML: found undefined alias 'other'"),
        ("parts: " + "[" * 5000, "a.yaml: nested too deeply"),
        ("parts: []\n", "a.yaml:1: name: is missing"),
        ("name: a\nparts:\n  - count: 1\n  -\n    count: 0\n",
         "a.yaml:5: parts.1.count: Input should be greater than or equal to 1, not 0"),
        ("name: a\nparts:\n  - {}\n", "a.yaml:3: parts.0.count: is missing"),
        ("name: a\n\nnmae: b\n", "a.yaml:3: nmae: unknown key"),
        ("name: a\n1: b\n", "a.yaml:2: a key must be a word; 1 is none unless it is in quotes"),
        ("name: a\non: yes\n", "a.yaml:2: a key must be a word; on is none unless it is in quotes"),
        ("name: no\n", "a.yaml:1: name: Input should be a valid string, not False"),
        ("name: a\nparts: {}\n", "a.yaml:2: parts: Input should be a valid list"),
        ("name: a\nname: b\n", "a.yaml:2: name stands twice"),
        ("name: a\nparts:\n  - count: 1\n    count: 2\n", "a.yaml:4: count stands twice"),
        ("name: 2026-01-02\n", "a.yaml:1: 2026-01-02 is a date in YAML; put it in quotes"),
        ("name: 2026-13-45\n", "a.yaml:1: 2026-13-45 is a date in YAML; put it in quotes"),
        ("name: a\nshare: !!float much\n", "a.yaml:2: much is no float"),
        ("name: a\ndry: !!bool maybe\n", "a.yaml:2: maybe is no bool"),
        ("name: a\nshare: 0b_\n", "a.yaml:2: 0b_ is no int"),
        ("name: a\nshare: " + "9" * 5000 + "\n", "a.yaml:2: " + "9" * 40 + " is no int"),
        ("name: !!python/object/apply:os.system [true]\n",
         "a.yaml:1: tag:yaml.org,2002:python/object/apply:os.system is not allowed: plain values only"),
        ("name: !mine a\n", "a.yaml:1: !mine is not allowed: plain values only"),
        ("name: a\n<<: {dry: yes}\n", "a.yaml:2: << is not allowed: plain keys only"),
        ("name: a\n? [x]\n: 1\n", "a.yaml:2: a key must be a word"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_line(text: str, message: str):
    assert refusal(text) == message


def test_all_mistakes_are_reported_in_the_order_of_their_lines():
    text = "half: 1\nshare: a lot\nparts:\n  - count: none\nname: a\n"
    assert [line.split(": ")[:2] for line in refusal(text).splitlines()] == [
        ["a.yaml:1", "half"],
        ["a.yaml:2", "share"],
        ["a.yaml:4", "parts.0.count"],
    ]


def test_aliases_that_multiply_cost_nothing():
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    assert "a.yaml:31: name: Input should be a valid string" in refusal(f"l0: &l0 [a]\n{levels}name: *l29\n")


def test_an_alias_inside_itself_is_only_wrong():
    assert refusal("name: &a [*a]\n") == "a.yaml:1: name: Input should be a valid string"


def test_the_error_is_of_the_class_asked_for():
    with pytest.raises(InvalidUsageError) as caught:
        parse_yaml(Document, "", origin="a.yaml", hint="look at b.yaml")
    assert type(caught.value) is InvalidUsageError


@given(text=st.one_of(st.text(), st.text(st.sampled_from("name:parts-count[]{}&*!?|>%@`'\"\n 01-.~"))))
@example("!!timestamp x")
@example("!!binary '='")
@example("? !!set {a}")
@example("!!omap [a]")
def test_no_text_brings_down_the_parser(text: str):
    try:
        parse(text)
    except RecipeError as error:
        assert error.message.startswith("a.yaml:")  # noqa: PT017 - a text may also be valid


_values: st.SearchStrategy[Any] = st.recursive(
    st.integers() | st.sampled_from(["a", "b c"]),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4)
        | st.dictionaries(st.sampled_from(["k", "l", "m", "7"]), inner, min_size=1, max_size=4)
    ),
    max_leaves=12,
)


def block(value: Any, indent: int, path: tuple[int | str, ...], lines: list[str], expected: dict[Any, int]) -> None:
    """Write `value` in YAML's block style, and note the line at which a reader finds each part of it."""
    for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
        head = "  " * indent + (f'"{step}":' if isinstance(value, dict) else "-")
        lines.append("# a comment between" if len(lines) % 3 == 1 else "")
        lines.append(head if isinstance(inner, dict | list) else f"{head} {inner}")
        expected[*path, step] = len(lines)
        if isinstance(inner, dict | list):
            if isinstance(value, list):  # an item begins where its content does
                expected[*path, step] = len(lines) + 2
            block(inner, indent + 1, (*path, step), lines, expected)


@given(value=_values.filter(lambda value: isinstance(value, dict)))
def test_the_line_of_any_location(value: dict[str, Any]):
    lines: list[str] = []
    expected: dict[Any, int] = {}
    block(value, 0, (), lines, expected)
    root = yaml.compose("\n".join(lines), Loader=yaml.SafeLoader)
    assert {location: line_of(root, location) for location in expected} == expected
    for location, line in expected.items():
        assert line_of(root, (*location, "no such key")) == line, "what is missing is missed at its parent"
    assert line_of(root, ("no such key", 0)) == root.start_mark.line + 1
    assert line_of(None, ("name",)) == 1
