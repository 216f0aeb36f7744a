"""Draw a plan as SVG without scripts: memory of each stage, and the timeline of a 1F1B step."""

import math
from collections.abc import Iterator
from html import escape as escape_html

from yuan.plan.json_fields import escape_text
from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan, Stage
from yuan.plan.pool import Pool
from yuan.plan.simulate import Timeline

PICTURE_WIDTH_PX = 960
LEFT_MARGIN_PX = 270  # for the labels of stages
RIGHT_MARGIN_PX = 112  # for numbers, clear of the bars and of the limit
ROW_HEIGHT_PX = 18
ROW_GAP_PX = 4
MEMORY_TOP_PX = 62  # of the first row; title and legend are above
TIMELINE_TOP_PX = 40
AXIS_HEIGHT_PX = 40
MAX_AXIS_TICKS = 8
MAX_LABEL_CHARS = 42  # of the label of a stage, so that it ends before the rows
MIN_CLASS_CHARS = 6  # of a device class in such a label
MAX_BOXES = 3000  # boxes of the timeline; a longer step shows only its first micro-batches
# A color for each term of `compute_memory_terms`, the same in every picture.
TERM_COLORS = {
    "weights": "#4878a8",
    "gradients": "#78a8c8",
    "gradient_buffer": "#a8c8d8",
    "optimizer": "#d89048",
    "activations": "#e8b878",
    "recompute_workspace": "#a86848",
    "stage_input": "#88a868",
    "embedding_output": "#b8c898",
    "attention_mask": "#c8a8c8",
    "backward_workspace": "#9878a8",
    "logits": "#c87878",
    "head_gradient": "#e8a8a8",
    "reserve": "#c0c0c0",
}
UNKNOWN_TERM_COLOR = "#606060"
FORWARD_COLOR = "#4878a8"
BACKWARD_COLOR = "#d89048"
LIMIT_COLOR = "#c03030"
GRID_COLOR = "#dddddd"


def draw_plan_svg(plan: PipelinePlan, pool: Pool, timeline: Timeline) -> str:
    """Draw memory and timeline, one below the other, with axes, a legend of colors and a title on every box."""
    rows_px = len(plan.stages) * ROW_HEIGHT_PX
    timeline_px = MEMORY_TOP_PX + rows_px + AXIS_HEIGHT_PX + 20
    height = timeline_px + TIMELINE_TOP_PX + rows_px + AXIS_HEIGHT_PX
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PICTURE_WIDTH_PX} {height}" '
            'font-family="sans-serif" font-size="11" role="img">',
            f"<title>{_escape(plan.model)} on {_escape(plan.pool)}</title>",
            f'<rect width="{PICTURE_WIDTH_PX}" height="{height}" fill="white"/>',
            *_draw_memory(plan, pool),
            f'<g transform="translate(0 {timeline_px})">',
            *_draw_timeline(plan, timeline),
            "</g></svg>",
        ]
    )


def _draw_memory(plan: PipelinePlan, pool: Pool) -> Iterator[str]:
    limits_gib = {group.device_class: group.memory_gib for group in pool.groups}
    limits_gib = {stage.device_class: limits_gib[stage.device_class] for stage in plan.stages}
    max_gib = max(*limits_gib.values(), plan.peak_memory_bytes / GIB)
    scale = _compute_scale(max_gib)
    names = [name for name in plan.stages[0].memory_terms if any(stage.memory_terms.get(name) for stage in plan.stages)]
    yield f'<text x="{LEFT_MARGIN_PX}" y="14" font-size="13">Memory of a device of each stage, GiB</text>'
    yield from _draw_legend(names)
    yield from _draw_axis(MEMORY_TOP_PX, len(plan.stages), max_gib, "GiB")

    for n, stage in enumerate(plan.stages):
        y = MEMORY_TOP_PX + n * ROW_HEIGHT_PX
        yield _draw_label(y, stage, n)
        x = float(LEFT_MARGIN_PX)
        for name in names:
            gib = stage.memory_terms.get(name, 0) / GIB
            if gib > 0:
                title = f"{name.replace('_', ' ')}: {gib:.2f} GiB"
                yield _draw_box(x, y, gib * scale, TERM_COLORS.get(name, UNKNOWN_TERM_COLOR), title)
            x += gib * scale
        limit_gib = limits_gib[stage.device_class]
        yield _draw_vertical(LEFT_MARGIN_PX + limit_gib * scale, y, ROW_HEIGHT_PX, LIMIT_COLOR, width=2)
        number_x = PICTURE_WIDTH_PX - RIGHT_MARGIN_PX + 12
        yield f'<text x="{number_x}" y="{y + 11}">{stage.memory_bytes / GIB:.1f} of {limit_gib:.1f}</text>'


def _draw_legend(names: list[str]) -> Iterator[str]:
    """Draw the colors of the terms and of the limit, in two lines."""
    entries = [(name.replace("_", " "), TERM_COLORS.get(name, UNKNOWN_TERM_COLOR)) for name in names]
    x, y = 4, 22
    for name, color in (*entries, ("limit of the device", LIMIT_COLOR)):
        width = 24 + 5 * len(name)
        if x + width > PICTURE_WIDTH_PX:
            x, y = 4, y + 16
        yield f'<rect x="{x}" y="{y}" width="9" height="9" fill="{color}"/>'
        yield f'<text x="{x + 12}" y="{y + 8}" font-size="9">{_escape(name)}</text>'
        x += width


def _draw_timeline(plan: PipelinePlan, timeline: Timeline) -> Iterator[str]:
    stages, num_micro_batches = timeline.forward_end.shape
    num_shown = min(num_micro_batches, max(2 * stages, MAX_BOXES // (2 * stages)))
    end_s = float(timeline.backward_end.max())
    title = f"One step: {timeline.seconds:.4g} s"
    if num_shown < num_micro_batches:
        # Up to the first pass that is not drawn, every stage is complete.
        end_s = float(timeline.forward_start[:, num_shown].min())
        title = (
            f"First {end_s:.4g} of {timeline.seconds:.4g} s of a step, in which {num_shown} of {num_micro_batches} "
            "micro-batches start"
        )
    scale = _compute_scale(end_s)
    yield f'<text x="{LEFT_MARGIN_PX}" y="0" font-size="13">{title}</text>'
    for x, color, name in (
        (LEFT_MARGIN_PX, FORWARD_COLOR, "forward"),
        (LEFT_MARGIN_PX + 70, BACKWARD_COLOR, "backward, with recomputation"),
    ):
        yield f'<rect x="{x}" y="10" width="9" height="9" fill="{color}"/><text x="{x + 12}" y="18">{name}</text>'
    yield from _draw_axis(TIMELINE_TOP_PX, len(plan.stages), end_s, "s")

    passes = (
        (FORWARD_COLOR, timeline.forward_start, timeline.forward_end),
        (BACKWARD_COLOR, timeline.backward_start, timeline.backward_end),
    )
    for n, stage in enumerate(plan.stages):
        y = TIMELINE_TOP_PX + n * ROW_HEIGHT_PX
        yield _draw_label(y, stage, n)
        for batch in range(num_shown):
            for color, starts, ends in passes:
                start, stop = float(starts[n, batch]), float(ends[n, batch])
                if start >= end_s:
                    continue
                width = max((min(stop, end_s) - start) * scale - 0.3, 0.2)
                title = f"micro-batch {batch + 1}: {start:.4g} to {stop:.4g} s"
                yield _draw_box(LEFT_MARGIN_PX + start * scale, y, width, color, title)
    if num_shown < num_micro_batches:
        yield from _draw_cut(LEFT_MARGIN_PX + end_s * scale, len(plan.stages), num_micro_batches - num_shown)


def _draw_cut(x: float, num_rows: int, num_hidden: int) -> Iterator[str]:
    """Mark where the timeline is cut: a zigzag, and the number of micro-batches that are not drawn."""
    teeth = "".join(f" l4 {ROW_HEIGHT_PX / 4} l-8 {ROW_HEIGHT_PX / 2} l4 {ROW_HEIGHT_PX / 4}" for _ in range(num_rows))
    yield f'<path d="M{x + 6:.1f} {TIMELINE_TOP_PX}{teeth}" fill="none" stroke="black"/>'
    yield f'<text x="{x + 14:.1f}" y="{TIMELINE_TOP_PX + 11}" font-size="9">cut here,</text>'
    yield f'<text x="{x + 14:.1f}" y="{TIMELINE_TOP_PX + 23}" font-size="9">{num_hidden} more</text>'


def _draw_axis(top: int, num_rows: int, maximum: float, unit: str) -> Iterator[str]:
    """Draw vertical grid lines at round numbers behind the rows, and the numbers with their unit below."""
    scale, height = _compute_scale(maximum), num_rows * ROW_HEIGHT_PX
    for value in choose_ticks(maximum):
        x = LEFT_MARGIN_PX + value * scale
        yield _draw_vertical(x, top, height, GRID_COLOR, width=1)
        yield f'<text x="{x:.1f}" y="{top + height + 14}" text-anchor="middle" font-size="9">{value:g}</text>'
    yield f'<text x="{LEFT_MARGIN_PX}" y="{top + height + 28}" font-size="10">{unit}</text>'


def choose_ticks(maximum: float) -> list[float]:
    """Return round numbers from 0 to a maximum, at most MAX_AXIS_TICKS, in steps of 1, 2 or 5 times a power of ten.

    >>> choose_ticks(79.1), choose_ticks(0.7)
    ([0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    """
    power = math.floor(math.log10(maximum / MAX_AXIS_TICKS))
    steps = [factor * 10.0**exponent for exponent in (power, power + 1) for factor in (1, 2, 5)]
    step = next(step for step in steps if maximum / step < MAX_AXIS_TICKS)
    return [round(n * step, 9 - power) for n in range(int(maximum / step + 1e-9) + 1)]


def _compute_scale(maximum: float) -> float:
    return (PICTURE_WIDTH_PX - LEFT_MARGIN_PX - RIGHT_MARGIN_PX) / maximum


def _draw_vertical(x: float, y: float, height: float, color: str, *, width: int) -> str:
    return f'<path d="M{x:.1f} {y - ROW_GAP_PX / 2} v{height}" stroke="{color}" stroke-width="{width}"/>'


def _draw_label(y: float, stage: Stage, number: int) -> str:
    """Write a stage's number, as the table of the plan counts it, its device class and its layers."""
    layers = f"{stage.layers} layer{'s' if stage.layers != 1 else ''}" if stage.layers else "head only"
    recomputation = f", {stage.recompute_layers} recomputed" if stage.recompute_layers else ""
    head, tail = f"{number + 1}: ", f", {layers}{recomputation}"
    device_class = escape_text(stage.device_class)
    name = shorten_name(device_class, max(MIN_CLASS_CHARS, MAX_LABEL_CHARS - len(head) - len(tail)))
    title = "" if name == device_class else f"<title>{_escape(device_class)}</title>"
    return f'<text x="4" y="{y + 11}" font-size="10">{title}{_escape(head + name + tail)}</text>'


def shorten_name(name: str, max_chars: int) -> str:
    """Return a name with an ellipsis in place of what exceeds a length.

    >>> shorten_name("A100-80", 7), shorten_name("A100-80 (slow)", 7)
    ('A100-80', 'A100-8…')
    """
    return name if len(name) <= max_chars else f"{name[: max_chars - 1]}…"


def _draw_box(x: float, y: float, width: float, color: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.2f}" height="{ROW_HEIGHT_PX - ROW_GAP_PX}" fill="{color}">'
        f"<title>{_escape(title)}</title></rect>"
    )


def _escape(text: str) -> str:
    """Escape a text for XML, which cannot hold control characters in any form."""
    return escape_html(escape_text(text))
