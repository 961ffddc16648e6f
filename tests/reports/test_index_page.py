"""index.html: whole, escaped, fetching nothing, and looked at by a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gemma_pack.errors import MachineError
from gemma_pack.outcome import BuiltImage, VariantOutcome
from gemma_pack.reports.index_page import render_index
from tests.reports.browser import look_at
from tests.reports.reports import estimate, make_report
from tests.reports.test_html import Outline

if TYPE_CHECKING:
    from collections.abc import Callable

HOST = "registry.example.com:5000/a-team-with-a-long-name/gemma-2-9b-it"


def outcome(
    recipe: str, share: float, kl_nats: float, verdict: str, model: str = "google/gemma-2-9b-it"
) -> VariantOutcome:
    directory = Path("out") / f"{model.rpartition('/')[2]}-quantized.{recipe}"
    divergence = make_report().divergence.model_copy(update={"kl_nats": estimate(kl_nats, 0.001)})
    image = BuiltImage(kind="modelcar", layout=Path(f"{directory}.oci"), digest="sha256:" + "a" * 64)
    return VariantOutcome(
        model=model,
        recipe=recipe,
        directory=directory,
        base_size_bytes=18_480_000_000,
        size_bytes=int(18_480_000_000 * share),
        report=make_report(verdict=verdict, divergence=divergence),
        images=(image.model_copy(update={"pinned": f"{HOST}@{image.digest}"}),),
    )


def matrix() -> tuple[VariantOutcome, ...]:
    lost = VariantOutcome(model="b/<i>odd", recipe="fp8", directory=Path("out/odd <b>.fp8"))
    return (
        outcome("w4a16", 0.33, 0.0312, "pass"),
        outcome("w8a8", 0.55, 0.0093, "pass"),
        outcome("nvfp4", 0.36, 0.0713, "fail"),
        outcome("fp8-dynamic", 0.55, 0.0041, "undecided"),
        outcome("w4a16", 0.34, 0.0402, "pass", model="b/<i>odd"),
        lost.failed("quantize", MachineError("no worker has <b>21 GB</b> of memory", hint="add one")),
    )


def test_the_page_is_whole_fetches_nothing_and_links_to_each_report() -> None:
    page = render_index(matrix(), Path("out"))
    outline = Outline(page)
    assert outline.open == []
    assert not {"script", "link", "iframe", "img", "object"} & set(outline.tags)
    assert not {"src", "srcset", "onclick"} & {name for name, _ in outline.attributes}
    links = {value for name, value in outline.attributes if name == "href"}
    assert "gemma-2-9b-it-quantized.w4a16.report/report.html" in links
    assert all(link and not link.startswith(("/", "http", "..")) for link in links)
    assert len(links) == 5
    for raw in ("<i>odd", "<b>21", "odd <b>"):
        assert raw not in page


def test_the_worst_comes_first_and_every_reason_is_said() -> None:
    page = render_index(matrix(), Path("out"))
    body = page[page.index("<body>") :]
    assert body.index("<strong>ERROR</strong>") < body.index("<table")
    assert "3 of 6 variants passed" in body
    assert "Failed to quantize: no worker has" in body
    assert f"{HOST}@sha256:" in body
    assert "<strong>PASS</strong>" in render_index(matrix()[:2], Path("out"))
    assert "<strong>FAIL</strong>" in render_index(matrix()[:4], Path("out"))


def test_the_picture_puts_each_variant_where_it_belongs() -> None:
    page = render_index(matrix(), Path("out"))
    dots = re.findall(r'<title>([\w-]+): [^<]*</title><circle class="value" cx="([\d.]+)" cy="([\d.]+)"', page)
    place = {name: (float(x), float(y)) for name, x, y in dots}
    assert set(place) == {"w4a16", "w8a8", "nvfp4", "fp8-dynamic"}  # a single variant has no picture
    assert place["w4a16"][0] < place["nvfp4"][0] < place["w8a8"][0] == place["fp8-dynamic"][0]
    assert place["nvfp4"][1] < place["w4a16"][1] < place["w8a8"][1] < place["fp8-dynamic"][1]


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_a_sideways_scroll(tool: Callable[[str], str], tmp_path: Path, width: int) -> None:
    seen = look_at(
        render_index(matrix(), Path("out")),
        """{
          overflow: page.scrollWidth - page.clientWidth,
          rows: [...document.querySelectorAll("td.name")].filter(one => one.getBoundingClientRect().width > 0).length,
          wide: [...document.querySelectorAll(".scroll")].filter(one => one.scrollWidth > one.clientWidth).length,
          open: document.querySelectorAll("details[open]").length,
        }""",
        chromium=tool("chromium"), work=tmp_path, width=width,
    )  # fmt: skip
    assert seen == {"overflow": 0, "rows": 6, "wide": 0, "open": 3}
