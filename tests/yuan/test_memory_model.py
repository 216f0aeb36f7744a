"""The memory of a stage: which terms depend on the device, and that the solver's coefficients are those terms."""

import dataclasses

import numpy as np
import pytest

from yuan.config import tiny, yuan_2b
from yuan.plan.memory_costs import build_memory_costs
from yuan.plan.memory_model import compute_memory_terms
from yuan.plan.pool import make_cpu_pool
from yuan.plan.pool_file import parse_pool
from yuan.plan.workload import Grid, Workload

GRID = Grid(pipeline_size=2, data_size=1, micro_batch_size=2, grad_accum_steps=4)
CPU_GROUP = make_cpu_pool().groups[0]
(A100_GROUP,) = parse_pool({"name": "a100", "group": [{"device_class": "A100-80", "count": 2}]}).groups


def make_work(model, precision="bf16", **changes):
    work = Workload(model=model, seq_len=256, global_batch_size=8, precision=precision, loss_block=64)
    return dataclasses.replace(work, **changes)


@pytest.mark.parametrize(
    ("group", "precision", "model", "has_mask"),
    [
        (A100_GROUP, "bf16", yuan_2b(), False),
        (A100_GROUP, "fp32", yuan_2b(), True),
        (CPU_GROUP, "bf16", yuan_2b(), True),
        (A100_GROUP, "bf16", dataclasses.replace(tiny(), num_heads=16), True),  # heads of 10
    ],
)
def test_isolated_documents_need_a_mask_where_flash_attention_has_no_kernel(group, precision, model, has_mask):
    terms = compute_memory_terms(make_work(model, precision), GRID, group, 0, 1, 0)
    size = 2 if precision == "bf16" else 4
    assert terms["attention_mask"] == has_mask * 2 * size * 256**2 * 2  # two live micro-batches of two samples
    without = make_work(model, precision, isolate_documents=False)
    assert compute_memory_terms(without, GRID, group, 0, 1, 0)["attention_mask"] == 0


def test_coefficients_of_each_class_sum_to_its_terms():
    groups, work = (A100_GROUP, CPU_GROUP), make_work(yuan_2b())
    costs = build_memory_costs(work, GRID, groups)
    for stage, (number, group) in ((stage, pair) for stage in range(2) for pair in enumerate(groups)):
        for layers, recompute_layers in ((3, 0), (7, 2)):
            terms = compute_memory_terms(work, GRID, group, stage, layers, recompute_layers)
            assert costs.compute_stage_bytes(stage, number, layers, recompute_layers) == np.sum(list(terms.values()))
