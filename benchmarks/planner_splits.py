"""Our split compared with DeepSpeed's own functions, compute time only: `python benchmarks/planner_splits.py`, seconds.

Goal: the slowest stage of our split is within 0.05 % of the least possible in every case.

48 cases: 24, 32, 42 and 84 layers over 4, 8, 16 and 32 stages, no fewer than two layers a stage, by four widths at
Yuan's vocabulary. DeepSpeed's methods partition the list of modules that its users define: an embedding, the layers and
a head, as its PipelineModule does. A figure is the slowest stage over the least possible, which is computed without the
solver.
"""

import statistics
import sys
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
from pairs import load_deepspeed_partitions, make_line, print_lines

from yuan.config import ModelConfig, yuan_102b
from yuan.plan.flops import count_head_forward_flops, count_layer_forward_flops
from yuan.plan.pool_file import parse_pool
from yuan.plan.solver import solve
from yuan.plan.stage_costs import build_stage_costs
from yuan.plan.workload import Grid, Workload

partition_balanced, partition_uniform = load_deepspeed_partitions()
LAYER_COUNTS = (24, 32, 42, 84)
STAGE_COUNTS = (4, 8, 16, 32)
HIDDEN_SIZES = (2048, 4096, 6144, 8192)
SEQ_LEN = 4096
GRAD_ACCUM_STEPS = 384
MEMORY_GIB = 900_000  # compute time only: memory must not be a constraint
# Mean and worst ratio of DeepSpeed's methods, recorded with other widths.
DEEPSPEED_RECORDED = {"parameters": "1.020 mean, 1.167 worst", "uniform": "1.071, 1.322", "type:layer": "1.121, 1.645"}


def compute_lower_bound(layers: int, stages: int, head: float) -> float:
    """Return the minimum time of the slowest stage, with 1 per layer, by trying every load of the last stage."""
    return min(max(-(-(layers - last) // (stages - 1)), last + head) for last in range(layers - stages + 2))


def split_with_deepspeed(method: str, model: ModelConfig, stages: int) -> list[int]:
    """Return DeepSpeed's bounds over embedding, layers and head."""
    ends, layer = model.vocab_size * model.hidden_size, model.layer_parameters
    weights = {
        "parameters": [ends, *[layer] * model.num_layers, ends],
        "type:layer": [0, *[1] * model.num_layers, 0],
    }
    if method == "uniform":
        return [int(bound) for bound in partition_uniform(model.num_layers + 2, stages)]
    return [int(bound) for bound in partition_balanced(weights[method], stages)]


def split_with_solver(model: ModelConfig, stages: int) -> list[int]:
    """Return the planner's bounds over the same modules, for time alone."""
    pool = parse_pool(
        {"name": "p", "group": [{"device_class": "A100-80", "count": stages, "memory_gib": MEMORY_GIB}]},
    )
    work = Workload(model=model, seq_len=SEQ_LEN, global_batch_size=GRAD_ACCUM_STEPS, precision="bf16", loss_block=512)
    grid = Grid(pipeline_size=stages, data_size=1, micro_batch_size=1, grad_accum_steps=GRAD_ACCUM_STEPS)
    costs = build_stage_costs(work, grid, pool.groups)
    no_links, no_finish = np.zeros_like(costs.time.link_s), np.zeros_like(costs.time.finish_fixed_s)
    compute_only = replace(costs.time, link_s=no_links, finish_fixed_s=no_finish, finish_layer_s=no_finish)
    layout = solve(replace(costs, time=compute_only))
    assert layout is not None
    return [0, *(1 + sum(layout.layers[:s]) for s in range(1, stages)), model.num_layers + 2]


def main() -> int:
    ratios_by_method: dict[str, list[float]] = {}
    for layers, stages, width in product(LAYER_COUNTS, STAGE_COUNTS, HIDDEN_SIZES):
        if stages > layers // 2:
            continue
        model = replace(yuan_102b(), num_layers=layers, hidden_size=width)
        head = count_head_forward_flops(model) / count_layer_forward_flops(model, SEQ_LEN)
        times = [0.0, *[1.0] * layers, head]
        best = compute_lower_bound(layers, stages, head)
        splits = {method: split_with_deepspeed(method, model, stages) for method in DEEPSPEED_RECORDED}
        for method, bounds in {"ours": split_with_solver(model, stages), **splits}.items():
            ratios_by_method.setdefault(method, []).append(max(sum(times[a:b]) for a, b in pairwise(bounds)) / best)
    ok = True
    for method, values in ratios_by_method.items():
        is_ours = method == "ours"
        entry = make_line(
            f"slowest stage over the least possible, {method}",
            round(statistics.mean(values), 4),
            "mean of 48 cases",
            None if is_ours else "DeepSpeed",
            statistics.mean(ratios_by_method["ours"]) / statistics.mean(values),
            goal="1.000, worst 1.000" if is_ours else None,
            ok=max(values) < 1.0005 if is_ours else None,
        )
        counts = {
            "worst": round(max(values), 4),
            "best_in": sum(value < 1.0005 for value in values),
            "cases": len(values),
        }
        recorded = {} if is_ours else {"recorded_with_other_widths": DEEPSPEED_RECORDED[method]}
        ok &= print_lines({**entry, **counts, **recorded})
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
