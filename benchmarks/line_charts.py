"""Line charts beside each other as one SVG, for benchmarks that measure over sizes."""

from collections.abc import Mapping, Sequence

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
PANEL_WIDTH, CHART_HEIGHT = 480, 380
AXIS_LEFT, AXIS_TOP, AXIS_WIDTH, AXIS_HEIGHT = 60, 40, 300, 290


def draw_line_charts(places: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Draw a panel of lines for each title; both axes start at 0.

    Args:
        places: positive positions on the horizontal axis, ascending, the same for all lines.
        panels: by title, the values of each line by its name, one at each place.
    """
    width = PANEL_WIDTH * len(panels)
    drawn = "".join(_draw_panel(number, title, places, lines) for number, (title, lines) in enumerate(panels.items()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{CHART_HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{CHART_HEIGHT}" fill="white"/>'
        f"{drawn}</svg>\n"
    )


def _draw_panel(number: int, title: str, places: Sequence[float], lines: Mapping[str, Sequence[float]]) -> str:
    axis_x, bottom = PANEL_WIDTH * number + AXIS_LEFT, AXIS_TOP + AXIS_HEIGHT
    highest = max(max(values) for values in lines.values()) or 1.0
    parts = [
        f'<text x="{axis_x}" y="{AXIS_TOP - 15}">{title}</text>',
        f'<path d="M{axis_x} {AXIS_TOP}V{bottom}H{axis_x + AXIS_WIDTH}" fill="none" stroke="black"/>',
        f'<text x="{axis_x - 5}" y="{AXIS_TOP + 5}" text-anchor="end">{highest:,.0f}</text>',
        f'<text x="{axis_x - 5}" y="{bottom}" text-anchor="end">0</text>',
    ]
    for place in places:
        x = axis_x + AXIS_WIDTH * place / places[-1]
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{place:g}</text>')

    for line_number, (name, values) in enumerate(lines.items()):
        color = COLORS[line_number % len(COLORS)]
        points = " ".join(
            f"{axis_x + AXIS_WIDTH * place / places[-1]:.1f},{bottom - AXIS_HEIGHT * value / highest:.1f}"
            for place, value in zip(places, values, strict=True)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        label_y = AXIS_TOP + 15 + 18 * line_number
        parts.append(f'<text x="{axis_x + AXIS_WIDTH + 10}" y="{label_y}" fill="{color}">{name}</text>')
    return "".join(parts)
