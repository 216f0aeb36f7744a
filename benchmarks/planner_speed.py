"""Planning time and its growth with the pool: `python benchmarks/planner_speed.py [PICTURE.svg]`, two minutes.

Goals: 5 s for 256 devices of two classes, 30 s for 1,024 of three, 1 s for a changed pool of 96 devices, 0.1 s for one
grid of 84 layers over 32 stages.

Whole plans without their explanation, 102B, S 4,096, batch 1,152 (larger pools: as many samples as devices, in steps of
1,152). The picture has seconds over devices.
"""

import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pairs import make_line, print_lines

from yuan.config import yuan_102b
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import make_plan
from yuan.plan.pool import Pool
from yuan.plan.pool_file import parse_pool
from yuan.plan.replan import replan, resize_pool, split_slow_devices
from yuan.plan.solver import solve
from yuan.plan.stage_costs import build_stage_costs
from yuan.plan.workload import Grid, Workload, compute_default_loss_block

GROWTH = {
    "A100-80": (64, 256, 1_000, 4_000, 10_000),
    "A100-80 and H200": (64, 256, 1_000, 4_000, 10_000),
}


def make_pool(**counts: int) -> Pool:
    return parse_pool({"name": "pool", "group": [{"device_class": name, "count": n} for name, n in counts.items()]})


def make_workload(devices: int = 0) -> Workload:
    model = yuan_102b()
    return Workload(
        model=model,
        seq_len=4096,
        global_batch_size=1152 * max(1, math.ceil(devices / 1152)),
        precision="bf16",
        loss_block=compute_default_loss_block(model),
    )


def replan_for(plan: PipelinePlan, pool: Pool) -> PipelinePlan:
    """Return the new plan for a changed pool."""
    return replan(make_workload(), plan, pool).plan


def time_plan(name: str, goal: float | None, work: Callable[[], PipelinePlan]) -> tuple[bool, float]:
    begun = time.perf_counter()
    plan = work()
    seconds = time.perf_counter() - begun
    entry = make_line(
        name,
        round(seconds, 3),
        "s",
        goal=None if goal is None else f"{goal} s",
        ok=None if goal is None else seconds <= goal,
    )
    ok = print_lines({**entry, "gap": plan.gap, "step_seconds": round(plan.step_seconds, 3)})
    return ok, seconds


def check_split_of_84_over_32() -> bool:
    pool, work = make_pool(**{"A100-80": 96}), make_workload()
    grid = Grid(pipeline_size=32, data_size=3, micro_batch_size=1, grad_accum_steps=384)
    begun = time.perf_counter()
    layout = solve(build_stage_costs(work, grid, pool.groups))
    seconds = time.perf_counter() - begun
    assert layout is not None
    return print_lines(
        make_line("84 layers over 32 stages, one grid", round(seconds, 4), "s", goal="0.1 s", ok=seconds <= 0.1)
    )


def main() -> int:
    ok = check_split_of_84_over_32()
    two, three = {"A100-80": 128, "H200": 128}, {"A100-40": 256, "A100-80": 256, "H200": 512}
    ok &= time_plan(
        "96 devices", None, lambda: make_plan(make_workload(), make_pool(**{"A100-80": 96}), explained=False)
    )[0]
    ok &= time_plan(
        "256 devices of two classes", 5, lambda: make_plan(make_workload(), make_pool(**two), explained=False)
    )[0]
    ok &= time_plan("the same, explained", None, lambda: make_plan(make_workload(), make_pool(**two)))[0]
    ok &= time_plan(
        "1,024 devices of three", 30, lambda: make_plan(make_workload(), make_pool(**three), explained=False)
    )[0]
    pool = make_pool(**{"A100-80": 96})
    plan = make_plan(make_workload(), pool, explained=False)
    for name, changed_pool in (
        ("a lost device", resize_pool(pool, {"A100-80": -1})),
        ("eight more", resize_pool(pool, {"A100-80": 8})),
        ("a slow one", split_slow_devices(pool, "A100-80", plan.data_size, 0.7)),
    ):
        ok &= time_plan(
            f"new plan for 96 devices and {name}",
            1,
            functools.partial(replan_for, plan, changed_pool),
        )[0]
    curves: dict[str, list[tuple[int, float]]] = {}
    for classes, sizes in GROWTH.items():
        for size in sizes:
            names = classes.split(" and ")
            grown = make_pool(**{name: size // len(names) for name in names})
            seconds = time_plan(
                f"{size:,} devices, {classes}",
                None,
                functools.partial(make_plan, make_workload(size), grown, explained=False),
            )[1]
            curves.setdefault(classes, []).append((size, seconds))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(draw_picture(curves))
    return 0 if ok else 1


def draw_picture(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Draw the chart; both axes are logarithmic, 10 to 100,000 devices and 0.01 to 100 s."""

    def at(devices: float, seconds: float) -> str:
        return f"{60 + 140 * (math.log10(devices) - 1):.1f},{260 - 60 * (math.log10(seconds) + 2):.1f}"

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 290" font-family="sans-serif" font-size="12">',
        '<rect width="700" height="290" fill="white"/><text x="60" y="14">Seconds to plan 102B, by devices</text>',
    ]
    for power in range(1, 6):
        x = at(10**power, 1).split(",")[0]
        lines.append(f'<path d="M{x} 20V260" stroke="#ddd"/><text x="{x}" y="278">{10**power:,}</text>')
    for power in range(-2, 3):
        y = at(10, 10.0**power).split(",")[1]
        lines.append(f'<path d="M60 {y}H620" stroke="#ddd"/><text x="20" y="{y}">{10.0**power:g}</text>')
    for n, (name, points) in enumerate(curves.items()):
        color = ("#4878a8", "#d89048")[n % 2]
        path = " ".join(at(devices, seconds) for devices, seconds in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        lines.append(f'<text x="80" y="{40 + 16 * n}" fill="{color}">{name}</text>')
    return "\n".join([*lines, "</svg>\n"])


if __name__ == "__main__":
    sys.exit(main())
