"""Curves with bands as one SVG that can be read on light and dark ground."""

from html import escape
from math import floor, log10

# Okabe and Ito's colours, which people with any colour vision tell apart; then again, dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07a00", "#3d9bd6")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 860, 360, 56, 44, 44, 230

STYLE = """text{font:13px system-ui,sans-serif;fill:#444}.title{font-size:15px;font-weight:600;fill:#111}
.ground{fill:#fff}.rule{stroke:#ddd}.level{stroke:#888;stroke-dasharray:2 4}.end{text-anchor:end}.middle{text-anchor:middle}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}polygon{fill-opacity:.13}
@media(prefers-color-scheme:dark){text{fill:#bbb}.title{fill:#eee}.ground{fill:#0d1117}.rule{stroke:#333}polygon{fill-opacity:.22}}"""


def ticks(low, high, count=5):
    """Round numbers from low to high, about `count`."""
    raw = (high - low or 1) / count
    unit = 10 ** floor(log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
    first = -(-low // step)
    return [
        round((first + i) * step, 10) for i in range(int((high - first * step) / step + 1e-9) + 1)
    ]


def picture(title, axis, curves, level):
    """`curves`: (name, [(x, mean, low, high)]); `level`: a line across, or None."""
    points = [point for _, points in curves for point in points]
    right, most = max(x for x, *_ in points) or 1, max(high for *_, high in points)
    least = min(low for _, _, low, _ in points)
    if level is not None:
        least, most = min(least, level), max(most, level)
    pad = 0.05 * (most - least or 1)
    least, most = least - pad, most + pad

    def at(x, y):
        across = LEFT + x / right * (WIDTH - LEGEND - LEFT)
        return f"{across:.1f},{HEIGHT - BOTTOM - (y - least) / (most - least) * (HEIGHT - TOP - BOTTOM):.1f}"

    def across(y, kind):
        (x1, y1), (x2, _) = at(0, y).split(","), at(right, y).split(",")
        return f'<path class="{kind}" d="M{x1} {y1}H{x2}"/>'

    parts = []
    for y in ticks(least, most):
        parts += [
            across(y, "rule"),
            f'<text class="end" x="{LEFT - 8}" y="{float(at(0, y).split(",")[1]) + 4:.1f}">{y:g}</text>',
        ]
    for x in ticks(0, right):
        parts.append(
            f'<text class="middle" x="{at(x, least).split(",")[0]}" y="{HEIGHT - BOTTOM + 18}">{x:g}</text>'
        )
    if level is not None:
        parts.append(across(level, "level"))
    for i, (name, curve) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        dash = ' stroke-dasharray="6 4"' if i >= len(COLOURS) else ""
        edge = [at(x, low) for x, _, low, _ in curve] + [
            at(x, high) for x, _, _, high in reversed(curve)
        ]
        parts.append(f'<polygon fill="{colour}" points="{" ".join(edge)}"/>')
        parts.append(
            f'<polyline stroke="{colour}"{dash} points="{" ".join(at(x, mean) for x, mean, *_ in curve)}"/>'
        )
        x, y = WIDTH - LEGEND + 16, TOP + 12 + 22 * i
        parts.append(f'<path stroke="{colour}" stroke-width="2"{dash} d="M{x} {y - 4}h26"/>')
        parts.append(f'<text x="{x + 34}" y="{y}">{escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><style>{STYLE}</style><rect class="ground" width="100%" height="100%"/>'
        f'<text class="title" x="{LEFT}" y="26">{escape(title)}</text>{"".join(parts)}'
        f'<text class="middle" x="{(LEFT + WIDTH - LEGEND) / 2}" y="{HEIGHT - 8}">{escape(axis)}</text></svg>\n'
    )
