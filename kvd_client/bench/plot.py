"""A picture of the ratios: a bar for each figure that has a limit, and a line where it would be reached."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kvd_client.bench.figures import Figure

WIDTH, NAME_WIDTH, BAR_WIDTH, ROW = 900, 400, 400, 20
#: Ratios beyond are cut; the number beside the bar says what they are.
MOST = 2.0
#: Bandwidths should reach far, latencies not.
COLOURS = {"GiB/s": "#3a7", "1/s": "#3a7"}
OTHER_COLOUR = "#47b"


def plot(figures: Sequence[Figure]) -> str:
    """SVG. Green: more is better (bandwidths); blue: less is better (latencies)."""
    shown = [one for one in figures if one.ratio is not None]
    height = ROW * (len(shown) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_x(1.0) - 40}" y="14">limit = 1.0</text>',
    ]
    for number, one in enumerate(shown):
        ratio, top = one.ratio or 0.0, ROW * (number + 1)
        length = _x(min(ratio, MOST)) - NAME_WIDTH
        lines += [
            f'<text x="{NAME_WIDTH - 8}" y="{top + 14}" text-anchor="end">{escape(one.name)}</text>',
            f'<rect x="{NAME_WIDTH}" y="{top + 3}" width="{length:.1f}" height="{ROW - 6}" '
            f'fill="{COLOURS.get(one.unit, OTHER_COLOUR)}"/>',
            f'<text x="{NAME_WIDTH + length + 4:.1f}" y="{top + 14}">{ratio:.2f}</text>',
        ]
    line = f'<line x1="{_x(1.0)}" y1="{ROW}" x2="{_x(1.0)}" y2="{height - ROW}" stroke="black" stroke-dasharray="4"/>'
    return "\n".join([*lines, line, "</svg>", ""])


def _x(ratio: float) -> float:
    return NAME_WIDTH + ratio / MOST * BAR_WIDTH
