"""Numbers and bars for the report, as text and SVG: the page needs neither scripts nor a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, ROW = 460, 22
LABELS, VALUES = 150, 70  # pixels for the names to the left of the bars, and for the numbers to their right


def number(value: float | None, digits: int = 3) -> str:
    """Return a value as tables show it, rounded to so many digits."""
    if value is None:
        return "–"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text else text


def bars(rows: Sequence[tuple[str, float | None, float | None]]) -> str:
    """Draw horizontal bars from zero, of a name, a value, and a standard error to mark or None."""
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
    height = len(rows) * ROW
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">{"".join(parts)}</svg>'
