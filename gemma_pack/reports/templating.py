"""The Jinja environment of all renderings; templates lie in `templates/` beside this file."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_pack.console import format_bytes

if TYPE_CHECKING:
    from jinja2 import Template


def template(name: str) -> Template:
    """Return the template; a name it uses and is not given is an error. HTML is escaped by the file's name."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["size"] = format_bytes
    environment.filters["cell"] = markdown_cell
    environment.filters["code"] = markdown_code
    environment.filters["compact"] = compact
    environment.filters["visible"] = visible
    return environment.get_template(name)


def visible(text: str) -> str:
    """Return a token with its white space drawn: `␣` and `⏎`."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")


def compact(number: float) -> str:
    """Write a number with three significant digits, small ones as powers of ten."""
    return "0" if number == 0 else f"{number:.1e}" if abs(number) < 1e-3 else f"{number:.3g}"


def markdown_cell(text: Any) -> str:  # noqa: ANN401 - whatever a template passes
    """Return text that stays in its cell of a Markdown table, and is shown as it is."""
    escaped = re.sub(r"[\\|*_\[\]~]", r"\\\g<0>", html.escape(str(text), quote=False))
    return escaped.replace("\n", "⏎").replace("\r", "␍").replace("`", "'")


def markdown_code(text: str) -> str:
    """Return text between backticks that stays in its cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "⏎").replace("\r", "␍").replace("`", "'")
