"""Charts as inline SVG: text in, text out, coloured by the classes of the page they stand in.

`line` draws curves over a common x axis, `reliability` the accuracy per bin of confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "line", "number", "reliability", "ticks"]

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 30, 40  # margins around the drawing
MOST_POINTS = 400  # per curve: more are thinned, a page stays small


@dataclass(frozen=True)
class Series:
    """A curve: its name and its points; points that are not finite are gaps and are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    def points(self) -> list[tuple[float, float]]:
        """The finite points, evenly thinned, the last one kept."""
        found = [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        stride = -(-len(found) // MOST_POINTS) or 1
        return found[::-stride][::-1]


def number(value: float) -> str:
    """A short number for people: 12.3k, 0.0125, 3e-07.

    Example:
        >>> [number(v) for v in (0, 0.25, 12.5, 1500, 2_000_000, 1e-7)]
        ['0', '0.25', '12.5', '1.5k', '2M', '1e-07']
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside `[low, high]`, about `count` of them, 1, 2 or 5 times a power of ten apart.

    Example:
        >>> ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= 0.999 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class _Frame:
    """Data coordinates to pixels, and the axes."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x0, self.x1 = x if x[1] > x[0] else (x[0] - 0.5, x[0] + 0.5)
        self.y0, self.y1 = y if y[1] > y[0] else (y[0] - 0.5 * (abs(y[0]) or 1), y[0] + 0.5 * (abs(y[0]) or 1))

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)
        up = (y - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    def axes(self, x_label: str) -> list[str]:
        parts = []
        for value in ticks(self.y0, self.y1):
            _, y = self.at(self.x0, value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{number(value)}</text>')
        for value in ticks(self.x0, self.x1):
            x, _ = self.at(value, self.y0)
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(value)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
        return parts


def _wrap(title: str, parts: Sequence[str]) -> str:
    name = escape(title, quote=True)
    heading = f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>'
    body = "\n".join([heading, *parts])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">\n{body}\n</svg>'


def line(title: str, series: Sequence[Series], x_label: str) -> str:
    """Curves over one x axis, with a legend; every point tells its values when it is pointed at.

    Curves without a finite point are left out; an empty string when none is left.
    """
    drawn = [(s.name, points) for s in series if (points := s.points())]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    frame = _Frame((min(xs), max(xs)), (min(ys), max(ys)))
    parts = frame.axes(x_label)
    place = float(WIDTH - RIGHT)
    for index, (name, points) in reversed(list(enumerate(drawn))):
        path = " ".join(f"{x},{y}" for x, y in (frame.at(*point) for point in points))
        parts.append(f'<polyline class="curve c{index}" points="{path}"/>')
        if len(points) <= 120:
            for x, y in points:
                px, py = frame.at(x, y)
                note = f"{name}: {y:.6g} at {number(x)}"
                parts.append(
                    f'<circle class="c{index}" cx="{px}" cy="{py}" r="2.5"><title>{escape(note)}</title></circle>'
                )
        if len(drawn) > 1:
            parts.append(f'<text class="c{index} legend" x="{place}" y="16" text-anchor="end">{escape(name)}</text>')
            place -= 7.0 * len(name) + 14
    return _wrap(title, parts)


def reliability(title: str, share: Sequence[float], accuracy: Sequence[float], confidence: Sequence[float]) -> str:
    """Accuracy over confidence, a bar per bin; on the dashed line the model is as often right as it says.

    A bar is as strong as its bin is full; the cross marks the bin's mean confidence.
    """
    frame = _Frame((0.0, 1.0), (0.0, 1.0))
    parts = frame.axes("confidence")
    (x0, y0), (x1, y1) = frame.at(0, 0), frame.at(1, 1)
    bins, most = len(share), max(share, default=0.0)
    for index, (part, right, sure) in enumerate(zip(share, accuracy, confidence, strict=True)):
        if not part:
            continue
        (left, top), (end, _) = frame.at(index / bins, right), frame.at((index + 1) / bins, right)
        note = f"{100 * part:.1f} % of the images: accuracy {right:.3f}, mean confidence {sure:.3f}"
        width, height, strength = round(end - left - 2, 1), round(y0 - top, 1), 0.25 + 0.75 * part / most
        parts.append(
            f'<rect class="bar" x="{left + 1}" y="{top}" width="{width}" height="{height}" '
            f'fill-opacity="{strength:.2f}"><title>{escape(note)}</title></rect>'
        )
        px, py = frame.at(sure, right)
        parts.append(f'<path class="cross" d="M{px - 4},{py}h8M{px},{py - 4}v8"/>')
    parts.append(f'<line class="diagonal" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>')
    return _wrap(title, parts)
