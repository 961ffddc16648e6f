"""Pictures of a report as inline SVG: no script, no outside font, readable on a phone and in print.

Colours come from the page's CSS classes, so that dark mode and print restyle them. Every chart has a title and a
description for readers that do not see it; its numbers stand in a table beside it.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gemma_pack.record import Metric
    from gemma_pack.report import HistogramBin, PositionBin, PromptParity

WIDTH = 640
HEIGHT = 240
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 26, 46
LABEL_HEIGHT = 16


def histogram(bins: Sequence[HistogramBin], mean: float) -> str:
    """Return the distribution of KL over tokens on a logarithmic axis; `mean`, in nats, is drawn as a line."""
    filled = [index for index, bin_ in enumerate(bins) if bin_.tokens]
    shown = list(bins[filled[0] : filled[-1] + 1]) if filled else list(bins[:1])
    floor = next((bin_.begin for bin_ in shown if bin_.begin > 0), shown[0].end) / 2
    edges = [math.log10(max(bin_.begin, floor)) for bin_ in shown] + [math.log10(shown[-1].end)]
    total = max(1, sum(bin_.tokens for bin_ in bins))
    top = max(bin_.tokens for bin_ in shown) / total or 1.0
    x = _scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y = _scale(0, top, HEIGHT - BOTTOM, TOP)
    parts = [_y_axis(y, top, lambda share: f"{100 * share:.3g} %")]
    for index, bin_ in enumerate(shown):
        share = bin_.tokens / total
        label = f"{bin_.begin:.2g} to {bin_.end:.2g} nats: {bin_.tokens} tokens, {100 * share:.1f} %"
        parts.append(_bar(x(edges[index]), x(edges[index + 1]), y(share), HEIGHT - BOTTOM, label))
    powers = range(math.ceil(edges[0]), math.floor(edges[-1]) + 1)
    parts.extend(_tick(x(power), f"{10.0**power:g}") for power in powers)
    if edges[0] < math.log10(max(mean, 1e-300)) < edges[-1]:
        parts.append(_marker(x(math.log10(mean)), f"mean {mean:.3g}"))
    parts.append(_caption("KL(base‖variant) of a token, nats"))
    return _svg("How far the variant is from the base, token by token", "Share of tokens by their KL", parts)


def positions(bins: Sequence[PositionBin]) -> str:
    """Return mean KL by place in the window."""
    top = max(bin_.kl_nats for bin_ in bins) or 1.0
    x = _scale(bins[0].begin, bins[-1].end, LEFT, WIDTH - RIGHT)
    y = _scale(0, top, HEIGHT - BOTTOM, TOP)
    parts = [_y_axis(y, top, lambda nats: f"{nats:.2g}")]
    for bin_ in bins:
        label = f"tokens {bin_.begin} to {bin_.end - 1}: {bin_.kl_nats:.3g} nats"
        parts.append(_bar(x(bin_.begin), x(bin_.end), y(bin_.kl_nats), HEIGHT - BOTTOM, label))
    step = max(1, len(bins) // 8)
    parts.extend(_tick(x(bin_.begin), str(bin_.begin)) for bin_ in bins[::step])
    parts.append(_caption("place in the window; 1 is the first token after <bos>"))
    return _svg("Where in the window it is worst", "Mean KL by place in the window", parts)


def tradeoff(points: Sequence[tuple[str, float, float, str]]) -> str:
    """Return variants by their share of the base's size and their mean KL, both from 0: the corner is the best place.

    Args:
        points: name, share, KL in nats and CSS class of each variant.
    """
    top = max(kl for _, _, kl, _ in points) * 1.15 or 1.0
    x = _scale(0, 1, LEFT, WIDTH - 2 * RIGHT)
    y = _scale(0, top, HEIGHT - BOTTOM, TOP)
    parts = [_y_axis(y, top, lambda kl: f"{kl:.2g}")]
    parts.extend(_tick(x(percent / 100), f"{percent} %") for percent in range(0, 101, 20))
    below: float = HEIGHT + LABEL_HEIGHT  # where the last label stands; the next must not cover it
    for name, share, kl, tone in sorted(points, key=lambda point: point[2]):
        below = min(y(kl) + 4, below - LABEL_HEIGHT)
        label = escape(f"{name}: {100 * share:.1f} % of the size, KL {kl:.4f} nats")
        side, anchor = (-9, "end") if share > 0.7 else (9, "start")
        parts.append(
            f'<g class="{tone}"><title>{label}</title>'
            f'<circle class="value" cx="{x(share):.1f}" cy="{y(kl):.1f}" r="5"/>'
            f'<text class="tick" x="{x(share) + side:.1f}" y="{below:.1f}" text-anchor="{anchor}">{escape(name)}'
            "</text></g>"
        )
    parts.append(_caption("size, of the bf16 base"))
    return _svg("What each variant costs and saves", "Mean KL in nats by size", parts)


def gauge(metric: Metric, *, higher_is_better: bool) -> str:
    """Return a bar for one judged measure: value as a dot, bound as a whisker, margin as a line."""
    if metric.margin is None or metric.bound is None or not math.isfinite(metric.bound):
        return ""
    width, height, middle = 240, 26, 13
    marks = (metric.value, metric.bound, metric.margin)
    low, high = min(0.0, *marks) if not higher_is_better else min(marks), max(marks)
    pad = (high - low) * 0.08 or 1.0
    x = _scale(low - (pad if higher_is_better else 0), high + pad, 4, width - 4)
    allowed = (x(metric.margin), width - 4) if higher_is_better else (4, x(metric.margin))
    tint = max(0.0, allowed[1] - allowed[0])
    ends = sorted((x(metric.value), x(metric.bound)))
    return (
        f'<svg class="gauge {metric.verdict}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(f"value {metric.value:.4g}, bound {metric.bound:.4g}, margin {metric.margin:.4g}")}">'
        f'<rect class="track" x="4" y="{middle - 3}" width="{width - 8}" height="6" rx="3"/>'
        f'<rect class="allowed" x="{allowed[0]:.1f}" y="{middle - 3}" width="{tint:.1f}" height="6" rx="3"/>'
        f'<line class="margin" x1="{x(metric.margin):.1f}" x2="{x(metric.margin):.1f}" y1="2" y2="{height - 2}"/>'
        f'<line class="whisker" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="value" cx="{x(metric.value):.1f}" cy="{middle}" r="5"/></svg>'
    )


def share(value: float) -> str:
    """Return a small bar that is `value`, 0 to 1, of its cell; the number stands beside it."""
    return (
        '<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="bar" x="0" y="0" width="{100 * max(0.0, min(1.0, value)):.1f}" height="8"/></svg>'
    )


def parting(prompts: Sequence[PromptParity], limit: int) -> str:
    """Return a line for each prompt, as long as the base's answer, and where on it the variant's answer parts."""
    ordered = sorted(prompts, key=lambda prompt: limit if prompt.first_divergent is None else prompt.first_divergent)
    pitch = max(4.0, min(12.0, 480 / len(ordered)))
    bottom = TOP + pitch * len(ordered)
    x = _scale(0, max(limit, 1), 14, WIDTH - RIGHT)
    parts = []
    for row, prompt in enumerate(ordered):
        top = TOP + pitch * row
        same = prompt.tokens if prompt.first_divergent is None else prompt.first_divergent
        where = "identical" if prompt.first_divergent is None else f"parts at token {same}"
        label = f"{prompt.prompt[:60]}: {where}{', a near-tie' if prompt.near_tie else ''}"
        for kind, begin, end in (("bar", 0, same), ("near" if prompt.near_tie else "parted", same, prompt.tokens)):
            if end > begin:
                parts.append(
                    f'<rect class="{kind}" x="{x(begin):.1f}" y="{top:.1f}" width="{x(end) - x(begin):.1f}" '
                    f'height="{0.7 * pitch:.1f}"><title>{escape(label)}</title></rect>'
                )
    step = max(1, limit // 8)
    parts += [
        f'<text class="tick" x="{x(token):.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{token}</text>'
        for token in range(0, limit + 1, step)
    ]
    parts.append(
        f'<text class="caption" x="{WIDTH / 2}" y="{bottom + 32:.1f}" text-anchor="middle">token of the answer</text>'
    )
    label = escape(f"Where greedy answers part: {len(ordered)} prompts")
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + 38:.0f}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _scale(begin: float, end: float, low: float, high: float) -> Callable[[float], float]:
    """Return the linear map from [begin, end] to [low, high]."""
    factor = (high - low) / ((end - begin) or 1.0)
    return lambda value: low + (value - begin) * factor


def _svg(title: str, description: str, parts: Sequence[str]) -> str:
    label = escape(f"{title}: {description}")
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _bar(left: float, right: float, top: float, bottom: float, label: str) -> str:
    return (
        f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{max(0.5, right - left - 1):.1f}" '
        f'height="{max(0.0, bottom - top):.1f}"><title>{escape(label)}</title></rect>'
    )


def _tick(x: float, label: str) -> str:
    bottom = HEIGHT - BOTTOM
    return (
        f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(label)}</text>'
    )


def _marker(x: float, label: str) -> str:
    anchor = "start" if x < WIDTH * 0.7 else "end"
    shift = 5 if anchor == "start" else -5
    return (
        f'<line class="marker" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 18}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="tick" x="{x + shift:.1f}" y="{TOP - 8}" text-anchor="{anchor}">{escape(label)}</text>'
    )


def _y_axis(y: Callable[[float], float], top: float, write: Callable[[float], str]) -> str:
    lines = []
    for part in (0.0, 0.5, 1.0):
        place, label = y(part * top), escape(write(part * top))
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{label}</text>'
        )
    return "".join(lines)


def _caption(text: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<text class="caption" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(text)}</text>'
