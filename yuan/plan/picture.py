"""A plan as a picture: what each stage keeps in memory, and a step of 1F1B on a time axis; SVG without scripts."""

from collections.abc import Iterator
from html import escape

from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import Plan, Stage
from yuan.plan.pool import Pool
from yuan.plan.simulate import Timeline

WIDTH, LEFT, ROW, GAP = 960, 120, 18, 4
MOST_BOXES = 3000  # micro-batches in the middle of a longer step are left out
COLOURS = ("#4878a8", "#78a8c8", "#a8c8d8", "#d89048", "#e8b878", "#a86848", "#88a868", "#b8c898", "#c8a8c8", "#888888")
FORWARD, BACKWARD = "#4878a8", "#d89048"


def draw(plan: Plan, pool: Pool, timeline: Timeline) -> str:
    """Both parts, one below the other; colours are named in the picture, and every box says what it is."""
    memory, timing = list(_memory(plan, pool)), list(_timing(plan, timeline))
    rows = len(plan.stages) * ROW
    second = rows + 90
    height = second + rows + 70
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
            'font-size="11" role="img">',
            f"<title>{escape(plan.model)} on {escape(plan.pool)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *memory,
            f'<g transform="translate(0 {second})">',
            *timing,
            "</g></svg>",
        ]
    )


def _memory(plan: Plan, pool: Pool) -> Iterator[str]:
    room = {group.device_class: group.memory_gib for group in pool.groups}
    scale = (WIDTH - LEFT - 60) / max(*room.values(), plan.peak_memory_bytes / GIB)
    names = sorted({name for stage in plan.stages for name in stage.memory_terms}, key=lambda n: -_total(plan, n))
    colours = {name: COLOURS[min(n, len(COLOURS) - 1)] for n, name in enumerate(names)}
    yield f'<text x="{LEFT}" y="14" font-size="13">Memory of a device of each stage, GiB</text>'
    x: float = LEFT
    shown = {name: colours[name] for name in names[: len(COLOURS) - 1]}
    for name, colour in [*shown.items(), *([("others", COLOURS[-1])] if len(names) > len(shown) else [])]:
        yield f'<rect x="{x}" y="22" width="9" height="9" fill="{colour}"/>'
        yield f'<text x="{x + 12}" y="30" font-size="9">{name.replace("_", " ")}</text>'
        x += 22 + 5 * len(name)
    for n, stage in enumerate(plan.stages):
        y = 38 + n * ROW
        yield _label(y, n, stage)
        at = float(LEFT)
        for name in names:
            width = stage.memory_terms.get(name, 0) / GIB * scale
            if width > 0:
                yield _box(at, y, width, colours[name], f"{name.replace('_', ' ')}: {width / scale:.2f} GiB")
            at += width
        yield f'<text x="{at + 4:.1f}" y="{y + 11}">{stage.memory_bytes / GIB:.1f}</text>'
        limit = LEFT + room[stage.device_class] * scale
        yield f'<path d="M{limit:.1f} {y - GAP / 2} v{ROW}" stroke="#c03030" stroke-width="2"/>'


def _timing(plan: Plan, timeline: Timeline) -> Iterator[str]:
    stages, accum = timeline.forward_end.shape
    kept = min(accum, max(2 * stages, MOST_BOXES // (2 * stages)))
    end = float(timeline.backward_end[:, :kept].max())
    scale = (WIDTH - LEFT - 10) / end
    left_out = f", its first {kept} of {accum} micro-batches" if kept < accum else ""
    yield f'<text x="{LEFT}" y="0" font-size="13">One step{left_out}: {end:.4g} s of {timeline.seconds:.4g} s</text>'
    for x, colour, word in ((LEFT, FORWARD, "forward"), (LEFT + 70, BACKWARD, "backward, recomputing included")):
        yield f'<rect x="{x}" y="8" width="9" height="9" fill="{colour}"/><text x="{x + 12}" y="16">{word}</text>'
    for n, stage in enumerate(plan.stages):
        y = 24 + n * ROW
        yield _label(y, n, stage)
        for batch in range(kept):
            for colour, starts, ends in (
                (FORWARD, timeline.forward_start, timeline.forward_end),
                (BACKWARD, timeline.backward_start, timeline.backward_end),
            ):
                start, stop = float(starts[n, batch]), float(ends[n, batch])
                width = max((stop - start) * scale - 0.3, 0.2)
                yield _box(LEFT + start * scale, y, width, colour, f"micro-batch {batch}: {start:.4g} to {stop:.4g} s")


def _total(plan: Plan, name: str) -> int:
    return sum(stage.memory_terms.get(name, 0) for stage in plan.stages)


def _label(y: float, number: int, stage: Stage) -> str:
    redone = f", {stage.recompute_layers} redone" if stage.recompute_layers else ""
    return f'<text x="4" y="{y + 11}" font-size="10">{number}: {stage.layers} layers{redone}</text>'


def _box(x: float, y: float, width: float, colour: str, says: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.2f}" height="{ROW - GAP}" fill="{colour}">'
        f"<title>{escape(says)}</title></rect>"
    )
