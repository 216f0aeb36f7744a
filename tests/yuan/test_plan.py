"""Configurations, pools and plans."""

from itertools import product

import pytest

from yuan.config import ModelConfig, Recipe, tiny, yuan_2b, yuan_51b, yuan_102b
from yuan.plan.planner import Plan, make_plan, split_layers
from yuan.plan.pool import Group, Pool, cpu_pool, load_pool
from yuan.train.folder import RunSpec

RECIPE = Recipe(max_steps=10, learning_rate=1e-3, seq_len=128, micro_batch_size=2, global_batch_size=8, warmup_steps=2)


def test_parameter_counts_are_the_published_ones():
    counts = [preset().num_parameters for preset in (yuan_2b, yuan_51b, yuan_102b)]
    assert counts == [2_088_724_480, 51_842_105_344, 102_577_954_816]


@pytest.mark.parametrize("head", [0.0, 0.2, 0.9, 2.5])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_no_split_has_a_faster_slowest_stage(num_stages, head):
    def slowest(split):
        return max(*split[:-1], split[-1] + head) if len(split) > 1 else split[-1] + head

    splits = [s for s in product(range(1, 8), repeat=num_stages) if sum(s) == 7]
    found = split_layers(7, num_stages, head_in_layers=head)
    assert sum(found) == 7
    assert slowest(found) == min(slowest(list(s)) for s in splits)


def test_demo_model_is_split_unevenly():
    plan = make_plan(tiny(512), RECIPE, cpu_pool())
    assert len(set(s.layers for s in plan.stages)) == 2
    assert Plan.from_json(plan.to_json()) == plan


def test_a_model_that_does_not_fit_is_infeasible_and_named():
    pool = Pool(name="small", groups=(Group(device_class="x", count=2, memory_gib=1, sustained_tflops=1),))
    plan = make_plan(yuan_2b(), RECIPE, pool)
    assert not plan.feasible
    assert "GiB and a device has 1.0" in plan.explanation


def test_more_stages_than_layers_is_refused():
    pool = Pool(name="p", groups=(Group(device_class="x", count=99, memory_gib=1, sustained_tflops=1),))
    with pytest.raises(ValueError, match="use a pool of at most"):
        make_plan(tiny(), RECIPE, pool)


def test_pool_files_are_read_by_name(tmp_path):
    file = tmp_path / "pools.toml"
    group = '[[pool.group]]\ndevice_class = "A100-80"\ncount = 8\nmemory_gib = 79.1\nsustained_tflops = 170\n'
    file.write_text(f'[[pool]]\nname = "a"\n{group}\n[[pool]]\nname = "b"\n{group}')
    assert load_pool(f"{file}:b").num_devices == 8
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        load_pool(str(file))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"micro_batch_size": 3}, "micro_batch_size must divide"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"warmup_steps": 10}, "warmup_steps must be below"),
        ({"precision": "fp8"}, "precision must be"),
    ],
)
def test_wrong_recipes_name_the_rule(changes, reason):
    with pytest.raises(ValueError, match=reason):
        Recipe(**{**RECIPE.to_json(), **changes})


def test_wrong_widths_name_the_rule():
    with pytest.raises(ValueError, match="use a multiple of 12"):
        ModelConfig(name="x", num_layers=1, hidden_size=32, num_heads=6, vocab_size=8, seq_len=8)


def test_a_plan_for_another_model_is_refused():
    plan = make_plan(tiny(512), RECIPE, cpu_pool())
    other = ModelConfig(**{**tiny(512).to_json(), "num_layers": 9})
    with pytest.raises(ValueError, match="plan again"):
        RunSpec(kind="pretrain", model=other, snapshot="s", plan=plan, recipe=RECIPE, seed=0, parent=None)
