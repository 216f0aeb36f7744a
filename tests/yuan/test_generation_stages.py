"""The devices of generation and the room beside training: what fits is found, and what does not is said."""

import dataclasses
from itertools import combinations

import pytest

from yuan.config import tiny, yuan_2b, yuan_51b, yuan_102b
from yuan.plan.generation_stages import (
    GenerationModel,
    NoGenerationDevices,
    choose_generation_devices,
    compute_cache_bytes,
    get_training_pool,
    has_serving_room,
    leave_serving_room,
    list_planning_pools,
    split_layers_by_bytes,
)
from yuan.plan.memory_model import GIB
from yuan.plan.planner import make_run_plan
from yuan.plan.pool import make_cpu_pool
from yuan.plan.pool_file import parse_pool
from yuan.plan.workload import Workload

SERVED = [GenerationModel(yuan_2b())]


def make_pool(count=1, memory_gib=79.1, **fields):
    group = {"device_class": "A100-80", "count": count, "memory_gib": memory_gib}
    return parse_pool({"name": "p", "group": [group], **fields})


def make_work(**changes):
    work = Workload(model=yuan_2b(), seq_len=4096, global_batch_size=8, precision="bf16", loss_block=4096)
    return dataclasses.replace(work, **changes)


@pytest.mark.parametrize(("model", "count"), [(yuan_2b(), 1), (yuan_51b(), 2), (yuan_102b(), 3)])
def test_fewest_devices_that_hold_the_weights_are_chosen(model, count):
    devices = choose_generation_devices(make_pool(8), model)
    assert (devices.device_class, devices.count, sum(devices.layers)) == ("A100-80", count, model.num_layers)
    assert 0 < devices.cache_bytes < count * 80 * GIB - 2 * model.num_parameters


def test_weights_in_fp32_take_more_devices():
    assert choose_generation_devices(make_pool(8), yuan_51b(), value_bytes=4).count == 3


def test_model_beyond_a_node_is_refused_with_the_sizes():
    with pytest.raises(NoGenerationDevices, match=r"need 2\d\d\.\d GiB, and a node of pool 'p' has 2 A100-80 of 77"):
        choose_generation_devices(make_pool(2), yuan_102b())


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_no_split_has_a_smaller_largest_stage(num_stages):
    model = dataclasses.replace(yuan_2b(), num_layers=9)
    others = model.num_parameters - model.num_layers * model.layer_parameters

    def find_largest(layers):
        return max(n * model.layer_parameters + (others if stage == 0 else 0) for stage, n in enumerate(layers))

    splits = [
        [end - begin for begin, end in zip((0, *cuts), (*cuts, 9), strict=True)]
        for cuts in combinations(range(1, 9), num_stages - 1)
    ]
    assert find_largest(split_layers_by_bytes(model, num_stages)) == min(map(find_largest, splits))


def test_cache_fits_on_every_stage():
    model, device_bytes = yuan_51b(), 77 * GIB
    layers = split_layers_by_bytes(model, 2)
    cache_bytes = compute_cache_bytes(model, layers, device_bytes)
    for stage, num_layers in enumerate(layers):
        weights = 2 * num_layers * model.layer_parameters
        weights += 2 * (model.num_parameters - model.num_layers * model.layer_parameters) * (stage == 0)
        assert weights + cache_bytes * num_layers / model.num_layers <= device_bytes


def test_default_of_one_gpu_is_to_share_if_a_plan_fits_else_to_yield():
    pool, work = make_pool(), make_work()
    plan = make_run_plan(work, pool)
    assert plan.feasible and has_serving_room(plan, pool, SERVED)

    small = make_pool(memory_gib=45.0)
    plan = make_run_plan(work, small)
    assert plan.feasible and not has_serving_room(plan, small, SERVED)


@pytest.mark.parametrize("serving", ["auto", "share"])
@pytest.mark.parametrize(("device_class", "count"), [("A100-80", 2), ("A100-40", 4), ("L40S", 2), ("RTX-4090", 8)])
def test_plan_that_was_made_with_room_for_the_model_server_has_it(device_class, count, serving):
    pool = parse_pool({"name": "p", "group": [{"device_class": device_class, "count": count}], "serving": serving})
    plan = make_run_plan(make_work(), pool)
    assert plan.feasible and has_serving_room(plan, pool, SERVED)


def test_room_is_that_of_the_champion_if_it_is_larger_than_the_trained_model():
    pool, champion = make_pool(serving="share"), GenerationModel(yuan_2b(), value_bytes=4)
    work = make_work(model=tiny(), seq_len=128)
    plan = make_run_plan(work, pool, champion=champion)
    room_bytes = 4 * yuan_2b().num_parameters
    assert plan.feasible and has_serving_room(plan, pool, [champion])
    assert plan.stages[0].memory_terms["reserve"] > room_bytes > 2 * yuan_2b().num_parameters


def test_shared_pool_refuses_a_plan_without_room_and_yielding_one_does_not():
    work = make_work()
    shared = make_run_plan(work, make_pool(memory_gib=45.0, serving="share"))
    yielding = make_run_plan(work, make_pool(memory_gib=45.0, serving="yield"))
    assert not shared.feasible and yielding.feasible
    assert not has_serving_room(yielding, make_pool(memory_gib=45.0, serving="yield"), SERVED)


def test_room_is_that_of_weights_and_cache():
    pool = make_pool(serving="share", serving_gib=6.0)
    room_gib = leave_serving_room(pool, SERVED).groups[0].reserve_gib - pool.groups[0].reserve_gib
    assert room_gib == pytest.approx(1.05 * 2 * yuan_2b().num_parameters / GIB + 6.0)


def test_own_devices_are_not_planned_for():
    pool = make_pool(4, serving="own", serving_devices=["A100-80/3"])
    (planned,) = list_planning_pools(pool, SERVED)
    assert planned.num_devices == get_training_pool(pool).num_devices == 3 and not planned.serving_devices


def test_default_pool_of_processors_is_planned_as_it_is():
    assert list_planning_pools(make_cpu_pool(), [GenerationModel(tiny())]) == [make_cpu_pool()]


def test_cluster_of_several_nodes_keeps_its_devices_for_training():
    assert not make_pool(16).uses_devices_for_serving
    assert not make_pool(8, launcher="slurm", launch={}).uses_devices_for_serving
    assert make_pool(8).uses_devices_for_serving
