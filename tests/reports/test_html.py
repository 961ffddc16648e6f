"""report.html: escaped, self-contained, and looked at by a real browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from gemma_pack.record import Metric
from gemma_pack.report import HistogramBin, PositionBin
from gemma_pack.reports import charts
from gemma_pack.reports.html import render_html
from tests.reports.browser import look_at
from tests.reports.reports import answer, make_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME = "gemma-2-9b-it-quantized.w4a16"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Outline(HTMLParser):
    """Checks that every element is closed, and collects elements and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing() -> None:
    outline = Outline(render_html(make_report(), NAME))
    assert outline.open == []
    assert not {"script", "link", "iframe", "img", "object"} & set(outline.tags)
    names = {name for name, _ in outline.attributes}
    assert not {"src", "href", "srcset", "onclick"} & names
    assert "url(" not in render_html(make_report(), NAME)


def test_text_of_models_is_escaped() -> None:
    page = render_html(make_report(), NAME)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>a break</b>" not in page
    parity = make_report().parity.model_copy(update={"prompts": (answer("<i>p", "<u>a", "<u>b", 0, 0.5),)})
    page = render_html(make_report(parity=parity), "<em>name")
    for raw in ("<i>p", "<u>a", "<em>name"):
        assert raw not in page


def test_the_verdict_comes_first() -> None:
    page = render_html(make_report(), NAME)
    body = page[page.index("<body>") :]
    assert body.index("<strong>PASS</strong>") < body.index("<table")


def test_answers_are_marked_from_where_they_part() -> None:
    page = render_html(make_report(), NAME)
    assert "<pre>Mars, <mark>Venus &amp; Earth</mark></pre>" in page
    assert "<pre>Mars, <mark>Mars, Mars</mark></pre>" in page


@pytest.mark.parametrize(
    ("metric", "higher", "order"),
    [
        (Metric(name="kl_nats", value=1, bound=2, margin=3, verdict="pass"), False, "value whisker margin"),
        (Metric(name="same_top1_percent", value=95, bound=94, margin=91, verdict="pass"), True, "margin whisker value"),
        (Metric(name="kl_nats", value=5, bound=6, margin=3, verdict="fail"), False, "margin value whisker"),
    ],
)
def test_a_gauge_puts_value_bound_and_margin_in_order(metric: Metric, higher: bool, order: str) -> None:
    drawn = charts.gauge(metric, higher_is_better=higher)
    value = float(re.findall(r'class="value" cx="([\d.]+)"', drawn)[0])
    ends = [float(x) for x in re.findall(r'class="whisker" x1="([\d.]+)" x2="([\d.]+)"', drawn)[0]]
    margin = float(re.findall(r'class="margin" x1="([\d.]+)"', drawn)[0])
    bound = ends[0] if abs(ends[1] - value) < abs(ends[0] - value) else ends[1]
    places = {"value": value, "whisker": bound, "margin": margin}
    assert sorted(places, key=lambda key: places[key]) == order.split()
    assert all(0 <= place <= 240 for place in places.values())


def test_what_has_no_bound_has_no_gauge() -> None:
    assert charts.gauge(Metric(name="m", value=1, margin=2), higher_is_better=False) == ""
    assert charts.gauge(Metric(name="m", value=1, bound=float("inf"), margin=2), higher_is_better=False) == ""


def test_a_line_for_each_prompt_shows_where_answers_part() -> None:
    drawn = charts.parting([*make_report().parity.prompts, answer("all", "a", "b", 0, 1.0)], 32)
    assert drawn.count('class="bar"') == 4
    assert (drawn.count('class="parted"'), drawn.count('class="near"')) == (3, 1)
    assert "Name three planets.: parts at token 2" in drawn
    ends = [float(x) + float(width) for x, width in re.findall(r'x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)]
    assert max(ends) <= charts.WIDTH


@pytest.mark.parametrize(
    "bins",
    [
        [HistogramBin(begin=0, end=1e-6, tokens=10), HistogramBin(begin=1e-6, end=1, tokens=0)],
        [HistogramBin(begin=0, end=1e-6, tokens=0), HistogramBin(begin=1e-6, end=1, tokens=0)],
        [HistogramBin(begin=0, end=1e-6, tokens=3), HistogramBin(begin=1e-6, end=1, tokens=4)],
    ],
    ids=["no divergence", "no token", "both"],
)
def test_histograms_of_odd_runs_stay_in_the_picture(bins: list[HistogramBin]) -> None:
    drawn = charts.histogram(bins, mean=0.0)
    assert "nan" not in drawn
    assert "inf" not in drawn
    for x, width in re.findall(r'class="bar" x="([-\d.]+)" y="[-\d.]+" width="([-\d.]+)"', drawn):
        assert 0 <= float(x) <= float(x) + float(width) <= charts.WIDTH


def test_no_divergence_has_a_flat_picture() -> None:
    drawn = charts.positions([PositionBin(begin=1, end=5, kl_nats=0), PositionBin(begin=5, end=9, kl_nats=0)])
    assert "nan" not in drawn
    assert re.findall(r'class="bar".*?height="([\d.]+)"', drawn) == ["0.0", "0.0"]


@pytest.mark.parametrize("width", [390, 1100])
def test_a_browser_shows_it_without_a_sideways_scroll(tool: Callable[[str], str], tmp_path: Path, width: int) -> None:
    """Opens all that can be opened, and asks for what is seen then."""
    seen = look_at(
        render_html(make_report(), NAME),
        """(() => {
          const closed = document.querySelectorAll("details:not([open])");
          closed.forEach(one => one.querySelector("summary").click());
          return {
            overflow: page.scrollWidth - page.clientWidth,
            opened: closed.length,
            stillClosed: document.querySelectorAll("details:not([open])").length,
            bars: [...document.querySelectorAll(".bar")].filter(bar => bar.getBoundingClientRect().width > 0).length,
            verdict: document.querySelector("strong").getBoundingClientRect().top,
          };
        })()""",
        chromium=tool("chromium"), work=tmp_path, width=width,
    )  # fmt: skip
    assert seen["overflow"] <= 0
    assert seen["stillClosed"] == 0
    assert seen["opened"] == 3  # the worst tokens and all answers but the first
    assert seen["bars"] == 4 + 16 + 2 + 4  # bins but the empty first, places, kinds, prompts that begin alike
    assert seen["verdict"] < 100
