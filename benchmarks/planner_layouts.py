"""The official 51B and 102B layouts compared with ours: `python benchmarks/planner_layouts.py`, seconds.

Goal: ours is at least as fast by the cost model.

Both use the same 96 devices, batch, loss and memory: each device has the memory of the official layout's largest stage,
or an A100's 79.1 GiB if that is more. Ours is planned once on the official grid, once on any; recomputation as needed.
"""

import sys
from dataclasses import replace

from pairs import make_line, print_lines

from yuan.config import MODEL_PRESETS
from yuan.plan.layout_prediction import predict_layout
from yuan.plan.memory_model import GIB
from yuan.plan.paper import OFFICIAL_LAYOUTS
from yuan.plan.pool_file import load_pool
from yuan.plan.search import SizeLimits, search
from yuan.plan.workload import PUBLISHED_BATCH_SIZES, Grid, Workload

NUM_DEVICES = 96


def main() -> int:
    ok = True
    pool = load_pool("benchmarks/pools/a100-96.toml")
    for name, (layers, recompute_layers) in OFFICIAL_LAYOUTS.items():
        work = Workload(
            model=MODEL_PRESETS[name](),
            seq_len=4096,
            global_batch_size=PUBLISHED_BATCH_SIZES[name],
            precision="bf16",
            isolate_documents=False,
        )
        stages = len(layers)
        data = NUM_DEVICES // stages
        grid = Grid(
            pipeline_size=stages,
            data_size=data,
            micro_batch_size=1,
            grad_accum_steps=work.global_batch_size // data,
        )
        official = predict_layout(
            work, grid, pool.groups, layers=layers, classes=[0] * stages, recompute_layers=[recompute_layers] * stages
        ).layout
        memory_gib = max(official.peak_bytes / GIB, pool.groups[0].memory_gib)
        equal_pool = replace(pool, groups=(replace(pool.groups[0], memory_gib=memory_gib),))
        for grid_name, limits in (
            ("its grid", SizeLimits(pipeline_size=stages, data_size=data, micro_batch_size=1)),
            ("any grid", SizeLimits()),
        ):
            planned = search(work, equal_pool, limits).candidates[0]
            speedup = official.seconds / planned.layout.seconds
            entry = make_line(
                f"{name}, {grid_name}",
                round(planned.layout.seconds, 2),
                "s/step",
                "official layout",
                speedup,
                goal="at least 1.0",
                ok=speedup >= 1,
            )
            ok &= print_lines(
                {
                    **entry,
                    "official_seconds": round(official.seconds, 2),
                    "official_peak_gib": round(official.peak_bytes / GIB, 1),
                    "peak_gib": round(planned.layout.peak_bytes / GIB, 1),
                    "grid": [planned.grid.pipeline_size, planned.grid.data_size, planned.grid.micro_batch_size],
                    "layers": planned.layout.layers,
                    "recompute_layers": planned.layout.recompute_layers,
                }
            )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
