"""Charts as SVG text: a title each, colours by class, so that the page's light and dark styles reach them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 6  # of the page's style: classes s0, s1, …
SHAPES = 4  # marks of different outline; a series has number % SHAPES, so that colour is not all that tells them apart


@dataclass(frozen=True)
class Mark:
    """One layer of one candidate. `value`: None if it stayed float. `label`: what a pointer over it shows."""

    x: float
    value: float | None
    series: int
    label: str


@dataclass(frozen=True)
class Span:
    """One block of one candidate: the mean of its layers and their range."""

    x: float
    value: float
    low: float
    high: float
    series: int
    label: str


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis from `low` to `high`, both above zero."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """0 at `low`, 1 at `high`; a value beyond them, zero and infinity too, at the end that it is beyond."""
        if value <= self.low:
            return 0.0
        if value >= self.high:
            return 1.0
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Powers of ten; where there are fewer than three, their doubles and halves too."""
        lowest, highest = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [step * 10.0**power for power in range(lowest, highest + 1) for step in steps]
            inside = [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]
            if len(inside) >= 3:
                break
        return inside


def log_scale(values: Iterable[float]) -> LogScale | None:
    """A scale around the positive finite values, at least a factor of four wide; None where there is none."""
    found = [value for value in values if math.isfinite(value) and value > 0]
    if not found:
        return None
    low, high = min(found) / 1.25, max(found) * 1.25
    widen = max(1.0, math.sqrt(4 * low / high))
    return LogScale(low / widen, high * widen)


def percent(value: float) -> str:
    """`0.0062` -> `0.62 %`: two digits."""
    if not math.isfinite(value):
        return "∞"
    return f"{float(f'{100 * value:.2g}'):.10g} %" if value >= 1e-6 or value == 0 else f"{100 * value:.1e} %"


def colour(series: int) -> str:
    """The class that the page's style has a colour for."""
    return f"s{series % COLOURS}"


def shape(series: int, x: float, y: float, size: float, inner: str = "") -> str:
    """The mark of a series: a circle, diamond, square or triangle around (x, y)."""
    name = f'class="{colour(series)}"'
    match series % SHAPES:
        case 0:
            return f'<circle {name} cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}">{inner}</circle>'
        case 1:
            d = f"M{x:.1f} {y - 1.3 * size:.1f}l{1.3 * size:.1f} {1.3 * size:.1f}l{-1.3 * size:.1f} {1.3 * size:.1f}"
            return f'<path {name} d="{d}l{-1.3 * size:.1f} {-1.3 * size:.1f}z">{inner}</path>'
        case 2:
            at = f'x="{x - 0.9 * size:.1f}" y="{y - 0.9 * size:.1f}"'
            return f'<rect {name} {at} width="{1.8 * size:.1f}" height="{1.8 * size:.1f}">{inner}</rect>'
        case _:
            d = f"M{x:.1f} {y - 1.2 * size:.1f}l{1.2 * size:.1f} {2.2 * size:.1f}h{-2.4 * size:.1f}z"
            return f'<path {name} d="{d}">{inner}</path>'


@dataclass(frozen=True)
class _Plot:
    """Where things are in a chart of `width` by `height`, with blocks `first` to `last` from left to right."""

    width: int
    height: int
    first: float
    last: float
    scale: LogScale
    left: int = 60
    right: int = 10
    top: int = 8
    bottom: int = 34
    inset: int = 8

    def x(self, value: float) -> float:
        room = self.width - self.left - self.right - 2 * self.inset
        spread = self.last - self.first
        return self.left + self.inset + (room * (value - self.first) / spread if spread else room / 2)

    def y(self, value: float) -> float:
        return self.top + (self.height - self.top - self.bottom) * (1 - self.scale.at(value))

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    def axes(self, label: str, name: Callable[[float], str] = percent) -> Iterable[str]:
        for tick in self.scale.ticks():
            y = self.y(tick)
            yield f'<path class="grid" d="M{self.left} {y:.1f}H{self.width - self.right}"/>'
            yield f'<text class="tick" x="{self.left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{name(tick)}</text>'
        yield f'<path class="axis" d="M{self.left} {self.top}V{self.floor}H{self.width - self.right}"/>'
        for x in whole_ticks(self.first, self.last, (self.width - self.left) // 44):
            at = f'x="{self.x(x):.1f}" y="{self.floor + 13}"'
            yield f'<path class="axis" d="M{self.x(x):.1f} {self.floor}v3"/>'
            yield f'<text class="tick" {at} text-anchor="middle">{x}</text>'
        middle = (self.top + self.floor) / 2
        turned = f'transform="translate(11 {middle:.1f}) rotate(-90)" text-anchor="middle"'
        yield f'<text class="tick" {turned}>relative error</text>'
        middle = (self.left + self.width - self.right) / 2
        yield f'<text class="tick" x="{middle:.1f}" y="{self.height - 5}" text-anchor="middle">{escape(label)}</text>'


def whole_ticks(first: float, last: float, most: int) -> list[int]:
    """Whole numbers from first to last, at even steps of 1, 2, 5, 10, …, at most about `most` of them."""
    spread = max(1.0, last - first)
    step = next(s * 10**p for p in range(9) for s in (1, 2, 5) if spread / (s * 10**p) <= max(1, most))
    return list(range(math.ceil(first / step) * step, math.floor(last) + 1, step))


def _svg(width: int, height: int, title: str, description: str, parts: Iterable[str], kind: str) -> str:
    label = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{label}{''.join(parts)}</svg>"
    )


def layer_panel(
    title: str, marks: Sequence[Mark], scale: LogScale, series: int, x_label: str = "block", *, joined: bool = True
) -> str:
    """The layers of one kind, from the first block to the last: one mark each, a float layer's on the axis.

    `joined`: whether a line leads from one to the next.
    """
    plot = _Plot(270, 150, min(mark.x for mark in marks), max(mark.x for mark in marks), scale)
    parts = list(plot.axes(x_label))
    for number in range(series):
        own = sorted((mark for mark in marks if mark.series == number), key=lambda mark: mark.x)
        quantized = [(plot.x(m.x), plot.y(m.value)) for m in own if m.value is not None]
        if len(quantized) > 1 and joined:
            line = "L".join(f"{x:.1f} {y:.1f}" for x, y in quantized)
            parts.append(f'<path class="thread {colour(number)}" d="M{line}"/>')
        for mark in own:
            inner = f"<title>{escape(mark.label)}</title>"
            if mark.value is None:
                at = f"M{plot.x(mark.x):.1f} {plot.floor - 5:.1f}v5"
                parts.append(f'<g class="mark"><path class="float {colour(number)}" d="{at}">{inner}</path></g>')
            else:
                point = shape(number, plot.x(mark.x), plot.y(mark.value), 2.8, inner)
                parts.append(f'<g class="mark">{point}</g>')
    count = sum(mark.value is not None for mark in marks)
    description = f"{count} quantized of {len(marks)} layers; relative error, logarithmic, by {x_label}"
    return _svg(plot.width, plot.height, title, description, parts, "panel")


def block_chart(title: str, spans: Sequence[Span], scale: LogScale, width: int, kind: str) -> str:
    """One mark a block and candidate, with a bar from its best layer to its worst."""
    plot = _Plot(width, 240, min(span.x for span in spans), max(span.x for span in spans), scale, inset=16)
    parts = list(plot.axes("block"))
    numbers = sorted({span.series for span in spans})
    for place, number in enumerate(numbers):
        aside = 7.0 * (place - (len(numbers) - 1) / 2) if len(spans) < 120 else 0.0
        own = sorted((span for span in spans if span.series == number), key=lambda span: span.x)
        points = [(plot.x(span.x) + aside, plot.y(span.value)) for span in own]
        parts.append(f'<path class="thread {colour(number)}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
        for span, (x, y) in zip(own, points, strict=True):
            parts.append(
                f'<path class="range {colour(number)}" d="M{x:.1f} {plot.y(span.high):.1f}V{plot.y(span.low):.1f}"/>'
                + shape(number, x, y, 3.8, f"<title>{escape(span.label)}</title>")
            )
    description = "relative error, logarithmic: root mean square of the block's layers, bar from best to worst"
    return _svg(width, plot.height, title, description, parts, kind)


def curves(title: str, lines: Sequence[tuple[int, Sequence[float]]], top: float) -> str:
    """Values from 0 to `top` over the frames, as wide and high as what it is put in; its axes' numbers stand beside it:
    text inside would be stretched."""
    parts = []
    for series, values in lines:
        step = 1000 / max(1, len(values) - 1)
        points = [f"{i * step:.1f} {48 - 46 * min(1.0, value / top):.2f}" for i, value in enumerate(values)]
        line = "L".join(points if len(points) > 1 else [*points, points[0].replace("0.0", "1000", 1)])
        parts.append(f'<path class="thread {colour(series)}" d="M{line}"/>')
    label = f"<title>{escape(title)}</title>"
    return (
        '<svg class="curve" viewBox="0 0 1000 50" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{label}<path class="grid" d="M0 2H1000M0 25H1000"/>'
        f'<path class="axis" d="M0 0V49H1000"/>{"".join(parts)}</svg>'
    )


def swatch(series: int) -> str:
    """The mark of a series for a legend or a heading; said by the text beside it."""
    return f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{shape(series, 7, 7.4, 4.4)}</svg>'
