"""Draw a plan as SVG without scripts: memory of each stage, and the timeline of a 1F1B step."""

from collections.abc import Iterator
from html import escape

from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan, Stage
from yuan.plan.pool import Pool
from yuan.plan.simulate import Timeline

PICTURE_WIDTH_PX = 960
LEFT_MARGIN_PX = 120
ROW_HEIGHT_PX = 18
ROW_GAP_PX = 4
MAX_BOXES = 3000  # boxes of the timeline; a longer step shows only its first micro-batches
TERM_COLORS = (
    "#4878a8",
    "#78a8c8",
    "#a8c8d8",
    "#d89048",
    "#e8b878",
    "#a86848",
    "#88a868",
    "#b8c898",
    "#c8a8c8",
    "#888888",
)
FORWARD_COLOR = "#4878a8"
BACKWARD_COLOR = "#d89048"


def draw_plan_svg(plan: PipelinePlan, pool: Pool, timeline: Timeline) -> str:
    """Draw memory and timeline, one below the other, with a legend of colors and a title on every box."""
    memory, timing = list(_draw_memory(plan, pool)), list(_draw_timeline(plan, timeline))
    rows = len(plan.stages) * ROW_HEIGHT_PX
    second = rows + 90
    height = second + rows + 70
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PICTURE_WIDTH_PX} {height}" '
            'font-family="sans-serif" font-size="11" role="img">',
            f"<title>{escape(plan.model)} on {escape(plan.pool)}</title>",
            f'<rect width="{PICTURE_WIDTH_PX}" height="{height}" fill="white"/>',
            *memory,
            f'<g transform="translate(0 {second})">',
            *timing,
            "</g></svg>",
        ]
    )


def _draw_memory(plan: PipelinePlan, pool: Pool) -> Iterator[str]:
    limits_gib = {group.device_class: group.memory_gib for group in pool.groups}
    scale = (PICTURE_WIDTH_PX - LEFT_MARGIN_PX - 60) / max(*limits_gib.values(), plan.peak_memory_bytes / GIB)
    names = sorted(
        {name for stage in plan.stages for name in stage.memory_terms}, key=lambda n: -_sum_term_bytes(plan, n)
    )
    colors = {name: TERM_COLORS[min(n, len(TERM_COLORS) - 1)] for n, name in enumerate(names)}
    yield f'<text x="{LEFT_MARGIN_PX}" y="14" font-size="13">Memory of a device of each stage, GiB</text>'
    x: float = LEFT_MARGIN_PX
    legend = {name: colors[name] for name in names[: len(TERM_COLORS) - 1]}
    for name, color in [*legend.items(), *([("others", TERM_COLORS[-1])] if len(names) > len(legend) else [])]:
        yield f'<rect x="{x}" y="22" width="9" height="9" fill="{color}"/>'
        yield f'<text x="{x + 12}" y="30" font-size="9">{name.replace("_", " ")}</text>'
        x += 22 + 5 * len(name)
    for n, stage in enumerate(plan.stages):
        y = 38 + n * ROW_HEIGHT_PX
        yield _draw_label(y, n, stage)
        box_x = float(LEFT_MARGIN_PX)
        for name in names:
            width = stage.memory_terms.get(name, 0) / GIB * scale
            if width > 0:
                yield _draw_box(box_x, y, width, colors[name], f"{name.replace('_', ' ')}: {width / scale:.2f} GiB")
            box_x += width
        yield f'<text x="{box_x + 4:.1f}" y="{y + 11}">{stage.memory_bytes / GIB:.1f}</text>'
        limit = LEFT_MARGIN_PX + limits_gib[stage.device_class] * scale
        yield f'<path d="M{limit:.1f} {y - ROW_GAP_PX / 2} v{ROW_HEIGHT_PX}" stroke="#c03030" stroke-width="2"/>'


def _draw_timeline(plan: PipelinePlan, timeline: Timeline) -> Iterator[str]:
    stages, num_micro_batches = timeline.forward_end.shape
    num_shown = min(num_micro_batches, max(2 * stages, MAX_BOXES // (2 * stages)))
    end = float(timeline.backward_end[:, :num_shown].max())
    scale = (PICTURE_WIDTH_PX - LEFT_MARGIN_PX - 10) / end
    note = f", its first {num_shown} of {num_micro_batches} micro-batches" if num_shown < num_micro_batches else ""
    title = f"One step{note}: {end:.4g} s of {timeline.seconds:.4g} s"
    yield f'<text x="{LEFT_MARGIN_PX}" y="0" font-size="13">{title}</text>'
    for x, color, word in (
        (LEFT_MARGIN_PX, FORWARD_COLOR, "forward"),
        (LEFT_MARGIN_PX + 70, BACKWARD_COLOR, "backward, with recomputation"),
    ):
        yield f'<rect x="{x}" y="8" width="9" height="9" fill="{color}"/><text x="{x + 12}" y="16">{word}</text>'
    for n, stage in enumerate(plan.stages):
        y = 24 + n * ROW_HEIGHT_PX
        yield _draw_label(y, n, stage)
        for batch in range(num_shown):
            for color, starts, ends in (
                (FORWARD_COLOR, timeline.forward_start, timeline.forward_end),
                (BACKWARD_COLOR, timeline.backward_start, timeline.backward_end),
            ):
                start, stop = float(starts[n, batch]), float(ends[n, batch])
                width = max((stop - start) * scale - 0.3, 0.2)
                yield _draw_box(
                    LEFT_MARGIN_PX + start * scale,
                    y,
                    width,
                    color,
                    f"micro-batch {batch}: {start:.4g} to {stop:.4g} s",
                )


def _sum_term_bytes(plan: PipelinePlan, name: str) -> int:
    return sum(stage.memory_terms.get(name, 0) for stage in plan.stages)


def _draw_label(y: float, number: int, stage: Stage) -> str:
    recomputation = f", {stage.recompute_layers} redone" if stage.recompute_layers else ""
    return f'<text x="4" y="{y + 11}" font-size="10">{number}: {stage.layers} layers{recomputation}</text>'


def _draw_box(x: float, y: float, width: float, color: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.2f}" height="{ROW_HEIGHT_PX - ROW_GAP_PX}" fill="{color}">'
        f"<title>{escape(title)}</title></rect>"
    )
