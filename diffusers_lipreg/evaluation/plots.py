"""Small plots as SVG text, for a page that needs neither scripts nor a plotting library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import floor, log10

WIDTH = 460
ROW = 22
LABELS = 150  # pixels for the names at the left of bars
VALUES = 70  # and for the numbers at their right
HEIGHT = 230
MARGINS = {"left": 58, "right": 16, "top": 12, "bottom": 40}


def number(value: float | None, digits: int = 3) -> str:
    """A value as tables show it, rounded to so many digits."""
    if value is None:
        return "–"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text else text


def bars(rows: Sequence[tuple[str, float | None, float | None]]) -> str:
    """Horizontal bars from zero: name, value, and a standard error to mark or None."""
    top = max([(value or 0.0) + (error or 0.0) for _, value, error in rows], default=0.0) or 1.0
    scale = (WIDTH - LABELS - VALUES) / top
    parts = []
    for index, (name, value, error) in enumerate(rows):
        y = index * ROW
        end = LABELS + (value or 0.0) * scale
        parts.append(f'<text class="end" x="{LABELS - 8}" y="{y + 15}">{escape(name)}</text>')
        parts.append(f'<rect class="fill" x="{LABELS}" y="{y + 4}" width="{end - LABELS:.1f}" height="{ROW - 8}"/>')
        right = end
        if error is not None:
            left, right = end - error * scale, end + error * scale
            parts.append(f'<path class="line" d="M{left:.1f} {y + ROW / 2}H{right:.1f}"/>')
        parts.append(f'<text x="{right + 6:.1f}" y="{y + 15}">{number(value)}</text>')
    return _svg(len(rows) * ROW, parts)


def decades(points: Sequence[tuple[float, float]], x_label: str, y_label: str) -> str:
    """A line through points of positive height, on a logarithmic scale of powers of ten; others are left out."""
    logs = [(x, log10(y)) for x, y in points if y > 0]
    if not logs:
        return "<p>nothing above zero</p>"
    low, high = floor(min(y for _, y in logs)), max(y for _, y in logs)
    powers = range(low, floor(high) + 2)
    ticks = {float(power): f"1e{power}" for power in powers if (power - low) % -(-len(powers) // 6) == 0}
    parts, place = _axes([x for x, _ in logs], (low, max(high, low + 1.0)), ticks, x_label, y_label)
    path = "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in logs)
    return _svg(HEIGHT, [*parts, f'<path class="curve" d="M{path}"/>'])


def scatter(points: Sequence[tuple[float, float, str]], x_label: str, y_label: str) -> str:
    """A dot with a name for each point."""
    top = 1.05 * max(max(y for _, y, _ in points), 1e-12)
    ticks = {tick: f"{tick:g}" for tick in _round_numbers(top)}
    parts, place = _axes([0.0, *(x for x, _, _ in points)], (0.0, top), ticks, x_label, y_label)
    for x, y, name in points:
        left, top = place(x, y)
        parts.append(f'<circle class="fill" cx="{left:.1f}" cy="{top:.1f}" r="4"><title>{escape(name)}</title></circle>')
        anchor, shift = ("end", -7) if left > WIDTH * 0.75 else ("start", 7)
        parts.append(f'<text class="{anchor} small" x="{left + shift:.1f}" y="{top - 4:.1f}">{escape(name)}</text>')
    return _svg(HEIGHT, parts)


def _round_numbers(top: float) -> list[float]:
    """Round numbers from 0 to `top`, three to six of them."""
    step = 10.0 ** floor(log10(top))
    step *= next(factor for factor in (0.2, 0.5, 1.0, 2.0) if top / (step * factor) <= 5)
    return [index * step for index in range(int(top / step) + 1)]


def _axes(
    xs: Sequence[float], y_range: tuple[float, float], ticks: Mapping[float, str], x_label: str, y_label: str
) -> tuple[list[str], Callable[[float, float], tuple[float, float]]]:
    """Grid, ticks and labels, and the function from values to pixels."""
    left_end, right_end = min(xs), max(xs)
    x_span, (bottom, top) = (right_end - left_end) or 1.0, y_range
    width = WIDTH - MARGINS["left"] - MARGINS["right"]
    height = HEIGHT - MARGINS["top"] - MARGINS["bottom"]

    def place(x: float, y: float) -> tuple[float, float]:
        share = (max(y, bottom) - bottom) / (top - bottom)
        return MARGINS["left"] + (x - left_end) / x_span * width, MARGINS["top"] + (1 - share) * height

    parts = []
    for tick, name in ticks.items():
        if tick <= top:
            left, y = place(left_end, tick)
            parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}h{width}"/>')
            parts.append(f'<text class="end small" x="{left - 6:.1f}" y="{y + 4:.1f}">{name}</text>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        left, y = place(left_end + share * x_span, bottom)
        parts.append(f'<text class="{anchor} small" x="{left:.1f}" y="{y + 15:.1f}">{left_end + share * x_span:.3g}</text>')
    middle = MARGINS["left"] + width / 2
    parts.append(f'<text class="middle small" x="{middle}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    turned = f'transform="translate(12 {MARGINS["top"] + height / 2}) rotate(-90)"'
    parts.append(f'<text class="middle small" {turned}>{escape(y_label)}</text>')
    return parts, place


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" role="img">{"".join(parts)}</svg>'
