"""Whether a model card, whoever wrote it, says what the record says.

The record is rendered as the card that it should have, and the two texts are compared claim by claim: front matter,
verdict, rows of tables, digests, and every number with a unit. What the other text says besides is its own affair;
a figure that no record stands behind is not, because a reader cannot tell the two apart.

Numbers agree when they are the same at the fewer decimals of the two. Code and links are not claims.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import yaml

FACTS: Final = (
    "base_model", "base_model_relation", "license", "license_name", "license_link", "pipeline_tag", "validated_on",
)  # fmt: skip
"""Keys of the front matter that state facts about the variant; name, tags and prose are the author's."""
_FENCE: Final = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"https?://[^\s)>\"]+|\]\([^)\n]*\)")
_VERDICT: Final = re.compile(r"\*\*(PASS|FAIL|UNDECIDED)\*\*")
_HEX: Final = re.compile(r"(?<![0-9a-f])(?:[0-9a-f]{64}|[0-9a-f]{40})(?![0-9a-f])")
_SCALES: Final = {
    "%": 1.0, "nats": 1.0, "tokens": 1.0, "windows": 1.0, "steps": 1.0, "samples": 1.0, "parameters": 1.0,
    "B": 1.0, "bytes": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20,
    "GiB": 2.0**30,
}  # fmt: skip
_UNITS: Final = "|".join(sorted(map(re.escape, _SCALES), key=len, reverse=True))
_NUMBER: Final = re.compile(rf"(?<![\w.-])([-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)(?:\s?({_UNITS})(?![\w]))?(?![\w])")
_COUNTS: Final = frozenset({"tokens", "windows", "steps", "samples", "parameters"})
_SCHEME: Final = re.compile(r"(?<![a-z0-9])(w\d+a\d+|int[48]|fp8|nvfp4|nf4)(?![a-z0-9])", re.IGNORECASE)
_UNJUDGED: Final = "Not validated yet"


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One claim of a card that the record does not bear out."""

    line: int
    """In the card, counted from 1; 0 for what is missing altogether."""
    says: str
    record: str
    """What the record says instead, in words."""


@dataclass(frozen=True, slots=True)
class _Number:
    value: float
    half_step: float
    """Half of its last decimal: what rounding may have taken or added."""
    unit: str
    text: str
    """As it is written."""

    def agrees(self, other: _Number) -> bool:
        """Whether this, a claim, is `other`, a figure of the record; a claim may leave its unit out.

        What the record writes without decimals is exact.
        """
        same_unit = self.unit in ("", other.unit) or (not other.unit and self.unit in _COUNTS)
        reach = max(self.half_step, other.half_step if "." in other.text else 0.0)
        return same_unit and abs(self.value - other.value) <= reach * (1 + 1e-9)


def compare_cards(text: str, reference: str) -> list[Disagreement]:
    """Return where the card `text` disagrees with `reference`, the card that its record renders to, by line."""
    matter, body, first_line = _split(text)
    known_matter, known_body, _ = _split(reference)
    found = [*_compare_matter(matter, known_matter), *_compare_verdicts(body, known_body, first_line)]
    rows = _rows(known_body)
    known_numbers = _numbers(_HEX.sub("", _prose(known_body))) + _numbers("95 % and 100 %")
    known_digests = set(_HEX.findall(known_body))
    schemes = {word.lower() for word in _SCHEME.findall(known_body.partition("\n## ")[0])}
    header: list[str] = []
    for number, line in enumerate(_prose(body).split("\n"), first_line):
        cells = _cells(line)
        found += [
            Disagreement(number, digest, "names no such digest or revision")
            for digest in _HEX.findall(line)
            if digest not in known_digests
        ]
        if line.startswith("#") or (cells and not header):
            strangers = [word for word in _SCHEME.findall(line) if word.lower() not in schemes]
            found += [Disagreement(number, word, f"says {', '.join(sorted(schemes))}") for word in strangers]
        if cells is None:
            header = []
            found += [
                Disagreement(number, claim.text, "has no such figure")
                for claim in _numbers(_HEX.sub("", line))
                if claim.unit and not any(claim.agrees(known) for known in known_numbers)
            ]
        elif not header:
            header = cells
        elif cells:
            found += _compare_row(number, cells, header, rows, known_numbers)
    return sorted(found, key=lambda one: one.line)


def _compare_matter(matter: dict[str, Any], known: dict[str, Any]) -> list[Disagreement]:
    """Compare the keys that state facts; what the card leaves out claims nothing, but licence and base must stand."""
    found = []
    for key in FACTS:
        required = key in ("base_model", "license") and key in known
        said, right = _listed(matter.get(key)), _listed(known.get(key))
        if (said or required) and said != right:
            found.append(
                Disagreement(2, f"{key}: {', '.join(said) or 'nothing'}", f"says {', '.join(right) or 'nothing'}")
            )
    return found


def _compare_verdicts(body: str, known: str, first_line: int) -> list[Disagreement]:
    right = set(_VERDICT.findall(known))
    words = ", ".join(right) or "no verdict"
    found = [
        Disagreement(first_line + body[: match.start()].count("\n"), match[1], f"says {words}")
        for match in _VERDICT.finditer(body)
        if match[1] not in right
    ]
    if _UNJUDGED in body and right:
        line = first_line + body[: body.index(_UNJUDGED)].count("\n")
        found.append(Disagreement(line, _UNJUDGED, f"says {words}"))
    if right & {"FAIL", "UNDECIDED"} and not _VERDICT.search(body):
        found.append(Disagreement(0, "no verdict", f"says {words}"))
    return found


def _compare_row(
    line: int,
    cells: list[str],
    header: list[str],
    rows: dict[str, list[tuple[list[str], list[str]]]],
    known_numbers: list[_Number],
) -> list[Disagreement]:
    """Compare a row with that of the same label: cell by cell where the columns have the same names."""
    label = _plain(cells[0])
    if label not in rows:
        return [
            Disagreement(line, f"{cells[0]}: {claim.text}", "has no such figure")
            for claim in _numbers(_HEX.sub("", " ".join(cells[1:])))
            if not any(claim.agrees(known) for known in known_numbers)
        ]
    found = []
    for column, cell in zip(header[1:], cells[1:], strict=False):
        candidates = [
            dict(zip(map(_plain, names[1:]), known[1:], strict=False)).get(_plain(column))
            for names, known in rows[label]
        ]
        texts = [text for text in candidates if text is not None] or [" ".join(known[1:]) for _, known in rows[label]]
        claims = _numbers(_HEX.sub("", cell))
        words = _plain(cell) if not claims else ""
        fits = any(
            all(any(claim.agrees(known) for known in _numbers(text)) for claim in claims) and words in _plain(text)
            for text in texts
        )
        if not fits:
            found.append(Disagreement(line, f"{cells[0]}, {column}: {cell}", f"says {texts[0] or 'nothing'}"))
    return found


def _split(text: str) -> tuple[dict[str, Any], str, int]:
    """Return front matter, body and the body's first line; matter that is no mapping states nothing."""
    match = re.match(r"---\n(.*?)^---[ \t]*\n", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, text, 1
    try:
        matter = yaml.safe_load(match[1])
    except yaml.YAMLError:
        matter = None
    return matter if isinstance(matter, dict) else {}, text[match.end() :], 1 + match[0].count("\n")


def _prose(body: str) -> str:
    """Return the body without code blocks and links, each line where it was."""
    without_code = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), body)
    return _LINK.sub("", without_code)


def _rows(body: str) -> dict[str, list[tuple[list[str], list[str]]]]:
    """Return the tables' rows by label, each with its table's header."""
    rows: dict[str, list[tuple[list[str], list[str]]]] = {}
    header: list[str] = []
    for line in _prose(body).split("\n"):
        cells = _cells(line)
        if cells is None:
            header = []
        elif not header:
            header = cells
        elif cells:
            rows.setdefault(_plain(cells[0]), []).append((header, cells))
    return rows


def _cells(line: str) -> list[str] | None:
    """Return the cells of a row of a Markdown table, none of the ruler below its header; None for any other line."""
    stripped = line.strip()
    if not stripped.startswith("|"):
        return None
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", stripped.removeprefix("|").removesuffix("|"))]
    return [] if all(re.fullmatch(r":?-+:?", cell) for cell in cells) else cells


def _plain(cell: str) -> str:
    return re.sub(r"[*_`\s]+", " ", cell).strip().lower()


def _numbers(text: str) -> list[_Number]:
    found = []
    for match in _NUMBER.finditer(text):
        digits, unit = match[1].replace(",", ""), match[2] or ""
        scale = _SCALES.get(unit, 1.0)
        mantissa, _, exponent = digits.partition("e")
        decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
        kind = "bytes" if unit.endswith(("B", "bytes")) else unit
        found.append(_Number(float(digits) * scale, 0.5 * 10.0**-decimals * scale, kind, match[0]))
    return found


def _listed(value: object) -> list[str]:
    if value is None:
        return []
    return sorted(map(str, value)) if isinstance(value, list) else [str(value)]
