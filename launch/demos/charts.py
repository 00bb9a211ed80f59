"""Curves as SVG and intervals as HTML, for a page without scripts."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 300, 150
LEFT, RIGHT, TOP, BOTTOM = 38, 8, 10, 20


class Curve(NamedTuple):
    """Points of a line; `kind` is its class in the page's style."""

    xs: Sequence[float]
    ys: Sequence[float]
    kind: str


def curves(title: str, given: Sequence[Curve], log: bool = False) -> str:
    """A small chart of curves over steps, as SVG."""
    given = [clean(curve, log) for curve in given]
    given = [curve for curve in given if curve.xs]
    if not given:
        return ""
    xs = [x for curve in given for x in curve.xs]
    ys = [y for curve in given for y in curve.ys]
    low, high = limits(ys, log)
    last = max(xs) or 1

    def place(x: float, y: float) -> str:
        share = (scaled(y, log) - scaled(low, log)) / (scaled(high, log) - scaled(low, log))
        return (
            f"{LEFT + (WIDTH - LEFT - RIGHT) * x / last:.1f},"
            f"{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share:.1f}"
        )

    parts = []
    for tick in ticks(low, high, log):
        x, y = place(0, tick).split(",")
        parts.append(f'<line class="rule" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{LEFT - 5}" y="{float(y) + 3.5:.1f}" text-anchor="end">{tick:.3g}</text>'
        )
    for step in (0, last):
        x = place(step, low).split(",")[0]
        anchor = "end" if step else "start"
        parts.append(f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{anchor}">{step:,.0f}</text>')
    for curve in given:
        points = " ".join(place(x, y) for x, y in zip(curve.xs, curve.ys, strict=True))
        parts.append(f'<polyline class="curve {curve.kind}" points="{points}"/>')
    label = html.escape(title, quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def clean(curve: Curve, log: bool) -> Curve:
    """Without what cannot be drawn."""
    points = [
        (x, y)
        for x, y in zip(curve.xs, curve.ys, strict=True)
        if math.isfinite(y) and (y > 0 or not log)
    ]
    return Curve([x for x, _ in points], [y for _, y in points], curve.kind)


def smoothed(ys: Sequence[float], share: float = 0.1) -> list[float]:
    """Means over a share of the curve around each point."""
    reach = round(len(ys) * share / 2)
    parts = [ys[max(0, k - reach) : k + reach + 1] for k in range(len(ys))]
    return [sum(part) / len(part) for part in parts]


def scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def limits(ys: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(ys), max(ys)
    if log:
        return (low / 1.05, high * 1.05) if high > low else (low / 2, high * 2)
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - room, high + room


def ticks(low: float, high: float, log: bool, about: int = 3) -> list[float]:
    """Round numbers between the limits."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        found = [value for value in found if low <= value <= high]
        return found[:: -(-len(found) // 4)] if found else ticks(low, high, False)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]


class Measured(NamedTuple):
    """A share with its interval, all in [0, 1]."""

    value: float
    low: float
    high: float
    kind: str


def track(given: Sequence[Measured], aim: float | None = None) -> str:
    """Shares with their intervals along a line from 0 to 100 %, as HTML."""
    parts = []
    if aim is not None:
        parts.append(f'<i class="aim" style="left:{100 * aim:.1f}%"></i>')
    for one in given:
        low, high = 100 * one.low, 100 * one.high
        parts.append(
            f'<i class="span {one.kind}" style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
            f'<i class="dot {one.kind}" style="left:{100 * one.value:.1f}%"></i>'
        )
    return f'<div class="track">{"".join(parts)}</div>'
