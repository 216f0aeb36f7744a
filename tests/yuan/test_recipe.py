"""Test recipes: their schema, the errors of wrong ones, and their resolution against data."""

import random
import re
import tomllib

import pytest

from flows.recipe_files import find_recipe_file
from yuan.config import MODEL_PRESETS, TrainConfig, tiny
from yuan.plan.planner import make_plan
from yuan.plan.pool import make_cpu_pool
from yuan.plan.search import SizeLimits
from yuan.plan.workload import Workload
from yuan.recipe import MAX_RECIPE_BYTES, Recipe, parse_recipe
from yuan.recipe_overrides import OVERRIDABLE_SECTIONS, override_recipe
from yuan.recipe_resolution import (
    RecipeUnfit,
    build_train_config,
    count_epoch_windows,
    list_trained_parts,
    resolve_length,
    resolve_part_places,
    resolve_part_weights,
)

RECIPE = """
[run]
kind = "finetune"
description = "a recipe of tests"
[model]
preset = "tiny"
weights = "parent"
[data]
seq_len = 128
[length]
epochs = 2.0
[schedule]
learning_rate = 1e-3
[optimizer]
weight_decay = 0.1
"""

# Values of the published recipes that say which model it is, or are ours.
UNSOURCED_VALUES = {"model.preset", "model.weights", "length.max_epochs", "schedule.warmup_steps"}


def make_recipe(**sections):
    """Return RECIPE with values of sections replaced or, if None, left out."""
    tables = parse_recipe(RECIPE.encode(), "r").to_json()
    for section, values in sections.items():
        table = {**tables.get(section, {}), **values}
        tables[section] = {key: value for key, value in table.items() if value is not None}
    return Recipe.model_validate(tables)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("[run]", "[ran]"), "ran: is unknown; did you mean 'run'?"),
        (("learning_rate", "learning_rat"), "schedule.learning_rat: is unknown; did you mean 'learning_rate'?"),
        (("128", '"128"'), "data.seq_len: must be an integer, got '128'; write digits alone"),
        (("128", "true"), "data.seq_len: must be an integer, got true"),
        (("128", "512"), "data.seq_len: must not be above the 256 positions of tiny, got 512; lower it"),
        (("1e-3", '"high"'), "schedule.learning_rate: must be a number, got 'high'; write one such as 0.5"),
        (("1e-3", "nan"), "schedule.learning_rate: must be"),
        (("1e-3", "1.5"), "schedule.learning_rate: must be less than 1.0, got 1.5; lower it"),
        (('"finetune"', '"sft"'), "run.kind: must be 'pretrain', 'continue' or 'finetune', got 'sft'; choose one"),
        (('"finetune"', '"pretrain"'), "model.weights: must be new for pretrain alone, got parent for pretrain"),
        (('"tiny"', '"tin"'), "model.preset: must be one of tiny, mini, 2b, 51b, 102b or parent, got 'tin'; did you"),
        (('"tiny"\n', '"tiny"\ntokenizer = "../x"\n'), "model.tokenizer: must be train or a folder's name"),
        (('"tiny"\n', '"tiny"\ntokenizer = "train"\n'), "model.tokenizer_vocab_size: is needed by a tokenizer that is"),
        (("seq_len", "fim_rate = 0.5\nseq_len"), "data.fim_rate: must be 0 for finetune, since it cuts answers"),
        (("seq_len", "replay_share = 1.0\nseq_len"), "data.replay_share: must be less than 1"),
        (("epochs = 2.0", ""), "length.steps: one of steps, tokens and epochs is needed, got 0; keep one"),
        (("epochs = 2.0", "epochs = 2.0\nsteps = 9"), "length.steps: one of steps, tokens and epochs is needed, got 2"),
        (("epochs = 2.0", "epochs = 9.0"), "length.epochs: must not be above max_epochs 4; lower it"),
        (
            ("[length]", "[batch]\nglobal_batch_size = 9\nmicro_batch_size = 2\n[length]"),
            "batch.micro_batch_size: must",
        ),
        (("[length]", '[sources]\n"data.seqlen" = "s"\n[length]'), "sources.data.seqlen: is no value of a recipe; did"),
        (
            ("weight_decay", 'state = "parent"\nweight_decay'),
            "optimizer.state: must be fresh unless run.kind is continue and model.weights is parent, got finetune",
        ),
        (
            ("[optimizer]", "[checkpoints]\nevery_steps = 20\nstore_every_steps = 10\n[optimizer]"),
            "checkpoints.store_every_steps: must not be below every_steps 20, got 10; raise it",
        ),
        (("weight_decay", 'state = "old"\nweight_decay'), "optimizer.state: must be 'fresh' or 'parent', got 'old'"),
        (("[length]", "[length"), "must be TOML: "),
        (("[length]", "[[length]]"), "length must be one table [length], got list; correct it"),
        (("a recipe of tests", "two\\nlines"), "run.description: must be one line, got the control"),
    ],
)
def test_wrong_recipe_gives_one_line_that_names_the_value(change, reason):
    assert change[0] in RECIPE
    with pytest.raises(ValueError, match=r"^recipe mine") as raised:
        parse_recipe(RECIPE.replace(*change).encode(), "mine")
    message = str(raised.value)
    assert reason in message and "\n" not in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff", "must be UTF-8, byte 0 is not"),
        (b"a" * (MAX_RECIPE_BYTES + 1), "are read; shorten it"),
        (b"a = " + b"[" * 100_000, "recipe mine must not be nested so deeply"),
        (b"a" + b".a" * 2**16 + b" = 1", "recipe mine must have at most 200 dots in a line"),
        (b"", "run: is missing"),
    ],
)
def test_content_that_is_no_recipe_is_refused(content, reason):
    with pytest.raises(ValueError, match=reason):
        parse_recipe(content, "mine")


def test_byte_order_mark_and_windows_line_ends_are_read():
    recipe = parse_recipe(RECIPE.encode(), "r")
    assert parse_recipe(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode(), "r") == recipe
    assert Recipe.model_validate(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("batch", "epoch_windows", "expected"),
    [
        ({}, 10_000, (312, 64)),  # 2 epochs of 10,000 windows: the largest batch gives more than 100 steps
        ({}, 1_600, (100, 32)),
        ({}, 1_599, (200, 16)),  # 32 windows a step would give 99 steps
        ({}, 100, (25, 8)),  # the smallest batch, although it gives fewer than 100 steps
        ({"max_global_batch_size": 512}, 100_000, (391, 512)),
        ({"global_batch_size": 10}, 100, (20, 10)),
    ],
)
def test_batch_is_the_largest_that_gives_enough_steps(batch, epoch_windows, expected):
    length = resolve_length(make_recipe(batch=batch), epoch_windows)
    assert (length.steps, length.global_batch_size) == expected
    assert length.epochs == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("epoch_windows", [201, 203, 207])
def test_as_many_epochs_as_the_limit_are_allowed_although_steps_are_whole(epoch_windows):
    length = resolve_length(make_recipe(length={"epochs": 4.0}), epoch_windows)
    assert length.epochs == pytest.approx(4, abs=0.51 * length.global_batch_size / epoch_windows)


def test_length_in_tokens_counts_whole_windows():
    recipe = make_recipe(length={"epochs": None, "tokens": 128 * 64 * 50}, batch={"global_batch_size": 64})
    assert resolve_length(recipe, 1000).steps == 50


@pytest.mark.parametrize(
    ("sections", "epoch_windows", "reason"),
    [
        ({}, 70, "the run would have 18 steps of 8 windows, at least 20 are needed"),
        ({}, 70, "lower batch.min_global_batch_size to 7"),
        ({"batch": {"global_batch_size": 64}}, 100, "lower batch.global_batch_size to 10"),
        ({"length": {"epochs": None, "steps": 10}}, 800, "; raise length.steps to 20 or lower length.min_steps to 10"),
        ({}, 27, "an epoch of the mixture has 27 windows of 128 tokens; add data"),
        ({"length": {"epochs": None, "steps": 100}}, 800, "read the new data 8.0 times, length.max_epochs is 4"),
        (
            {"length": {"epochs": None, "steps": 100}},
            800,
            "add data, lower length.steps to 50, lower batch.max_glo",
        ),
    ],
)
def test_run_that_is_too_short_or_too_long_names_the_change_that_helps(sections, epoch_windows, reason):
    with pytest.raises(RecipeUnfit, match=reason):
        resolve_length(make_recipe(**sections), epoch_windows)


def draw_recipe(rng):
    """Return a recipe of any length, batch and limits, and the epochs that earlier rounds have read."""
    unit = rng.choice(["steps", "tokens", "epochs"])
    value = {"steps": rng.randint(1, 300), "tokens": 128 * rng.randint(1, 5000), "epochs": rng.choice([0.5, 1.0, 3.0])}
    batch = {"min_global_batch_size": rng.choice([1, 4, 8]), "target_steps": rng.choice([5, 20, 100])}
    if rng.random() < 0.5:
        micro_batch_size = rng.choice([1, 3, 8])
        batch |= {"global_batch_size": micro_batch_size * rng.randint(1, 12), "micro_batch_size": micro_batch_size}
    limits = {"min_steps": rng.choice([1, 20, 50]), "max_epochs": rng.choice([3.0, 4.0])}
    length = {"epochs": None, unit: value[unit], **limits}
    kind = rng.choice(["finetune", "continue"])
    return make_recipe(batch=batch, length=length, run={"kind": kind}), rng.choice([0.0, 2.9, 7.25])


def test_every_change_that_an_error_advises_helps_alone():
    rng, num_refused, num_changes = random.Random(5), 0, 0
    for _ in range(1500):
        (recipe, epochs_read), epoch_windows = draw_recipe(rng), rng.choice([1.0, 3.0, 27.0, 53.7, 800.0, 20_000.0])
        try:
            resolve_length(recipe, epoch_windows, epochs_read=epochs_read)
        except RecipeUnfit as error:
            num_refused += 1
            advice = str(error).rpartition("; ")[2]
        else:
            continue
        ways_out = [change for change in re.split(", | or ", advice) if change and change != "add data"]
        assert ways_out, advice
        for way_out in ways_out:
            overrides = {}
            for verb, section, key, value in re.findall(r"(lower|raise) (\w+)\.(\w+) to ([\d.]+)", way_out):
                now = recipe.list_values()[f"{section}.{key}"]
                new = float(value) if key in ("epochs", "max_epochs") else int(value)
                assert (new < now) == (verb == "lower") and new != now
                overrides.setdefault(section, {})[key] = new
            changed = override_recipe(recipe, "r", overrides)
            resolve_length(changed, epoch_windows, epochs_read=epochs_read)
            num_changes += 1
    assert num_refused > 300 and num_changes > 600


def test_replay_share_is_the_base_share_of_windows():
    windows = {"corrections": 10, "datasets": 30, "base": 500}
    recipe = make_recipe(data={"replay_share": 0.5})
    weights = resolve_part_weights(recipe, windows)
    assert weights == {"corrections": 10, "datasets": 30, "base": 40}
    assert count_epoch_windows(windows, weights) == 80  # half of 80 windows are the 40 new ones
    assert resolve_part_weights(recipe, {"base": 500}) is None  # nothing new: no share to keep
    assert resolve_part_weights(recipe, {"datasets": 500}) is None  # no base to replay
    assert count_epoch_windows(windows, None) == 540


def test_every_new_window_has_a_place_however_few_its_part_has():
    recipe = make_recipe(data={"replay_share": 0.25})
    windows = {"corrections": 1, "datasets": 599_999, "base": 7}
    places = resolve_part_places(recipe, windows)
    assert places == {"corrections": 1, "datasets": 599_999, "base": 200_000}
    assert count_epoch_windows(windows, resolve_part_weights(recipe, windows)) == pytest.approx(sum(places.values()))
    assert resolve_part_places(recipe, {"base": 7}) is None and resolve_part_places(recipe, {"datasets": 7}) is None
    assert resolve_part_places(make_recipe(), windows) is None


def test_base_is_not_trained_on_at_a_replay_share_of_0():
    parts = ["corrections", "base"]
    assert list_trained_parts(make_recipe(data={"replay_share": 0.0}), parts) == ["corrections"]
    assert list_trained_parts(make_recipe(data={"replay_share": 0.0}), ["base"]) == ["base"]
    assert list_trained_parts(make_recipe(), parts) == list_trained_parts(
        make_recipe(data={"replay_share": 0.1}), parts
    )


def test_part_with_rows_and_without_weight_is_refused():
    recipe = make_recipe(mixture={"base": 1.0})
    with pytest.raises(RecipeUnfit, match="lacks corrections, datasets, which have rows; give each a weight"):
        resolve_part_weights(recipe, {"corrections": 1, "datasets": 1, "base": 1})
    assert resolve_part_weights(make_recipe(mixture={"base": 1.0, "datasets": 3.0}), {"base": 9}) == {"base": 1.0}


def test_resolved_settings_are_those_of_the_recipe():
    recipe = make_recipe(schedule={"kind": "wsd", "decay_share": 0.2, "warmup_steps": 500}, guard={"max_skips": 5})
    length = resolve_length(recipe, 1600)
    work = Workload(model=tiny(), seq_len=128, global_batch_size=length.global_batch_size, precision="bf16")
    plan = make_plan(work, make_cpu_pool(), SizeLimits(micro_batch_size=4), explained=False)
    settings = build_train_config(recipe, length, plan)
    assert settings == TrainConfig(
        max_steps=100,
        learning_rate=1e-3,
        seq_len=128,
        micro_batch_size=4,
        global_batch_size=32,
        schedule="wsd",
        warmup_steps=50,  # at most half of the run
        decay_share=0.2,
        final_lr_ratio=0.1,
        weight_decay=0.1,
        precision="bf16",
        checkpoint_every=None,
        max_skips=5,
    )


def test_overrides_replace_values_and_their_sources():
    recipe = make_recipe(sources={"length.epochs": "paper", "data.seq_len": "paper"})
    changed = override_recipe(recipe, "r", {"length": {"steps": 30}, "data": {"replay_share": 0.25}})
    assert (changed.length.steps, changed.length.epochs, changed.data.replay_share) == (30, None, 0.25)
    assert changed.sources == {"data.seq_len": "paper"}
    shorter = override_recipe(recipe, "r", {"data": {"seq_len": 64}})
    assert shorter.sources == {"length.epochs": "paper"} and shorter.data.seq_len == 64
    with pytest.raises(ValueError, match=r"recipe r: data.seq_len: must not be above the 256 positions of tiny"):
        override_recipe(recipe, "r", {"data": {"seq_len": 1024}})


def test_sections_that_choose_files_cannot_be_replaced():
    assert {"run", "model", "sources"}.isdisjoint(OVERRIDABLE_SECTIONS)
    assert set(OVERRIDABLE_SECTIONS) | {"run", "model", "sources"} == set(Recipe.model_fields)


def test_presets_have_the_positions_that_their_recipes_may_use():
    assert MODEL_PRESETS["mini"]().vocab_size == MODEL_PRESETS["2b"]().vocab_size == 135_040


@pytest.mark.parametrize("size", ["2b", "51b", "102b"])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_published_recipes_name_the_source_of_each_value_and_let_documents_attend_to_each_other(tmp_path, kind, size):
    name = f"paper-{kind}-{size}"
    content = find_recipe_file(tmp_path, name).read()
    sections = tomllib.loads(content.decode())
    values = {f"{section}.{key}" for section in sections.keys() - {"run", "sources"} for key in sections[section]}
    assert values - UNSOURCED_VALUES <= sections["sources"].keys() <= values
    assert not parse_recipe(content, name).data.isolate_documents
