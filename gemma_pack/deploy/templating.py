"""Rendering of the text files beside this module.

Templates instead of built mappings, because a manifest is read by people: it carries its reasons as comments.
Whatever comes from outside goes through one of the filters, so that nothing in a record or an option can add a line
or a key: `yaml` writes a quoted scalar or a flow sequence, `comment` one line of text, `shell` one word.
"""

from __future__ import annotations

import json
import shlex
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:  # noqa: ANN401 - what the template names
    """Return the template of that name, which is the file's without `.j2`, filled."""
    return _environment().get_template(f"{template}.j2").render(**values)


def one_line(text: object) -> str:
    """Return `text` as one line of printable characters: line breaks of any kind become spaces."""
    return "".join(character for character in " ".join(str(text).split()) if character.isprintable())


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gemma_pack.deploy"),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - YAML and shell, not HTML; each value is quoted by its filter
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = json.dumps  # a JSON value in ASCII is the same value in YAML
    environment.filters["comment"] = one_line
    environment.filters["shell"] = lambda text: shlex.quote(str(text))
    return environment
