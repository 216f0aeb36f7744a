"""Resolve a recipe against the data and the devices of a run: batch, steps and weights of the parts."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from yuan.config import MODEL_PRESETS, ModelConfig, TrainConfig, format_count
from yuan.plan.plan_record import PipelinePlan
from yuan.recipe import Recipe
from yuan.recipe_overrides import override_recipe

REPLAY_PART = "base"  # the part of a snapshot that is trained on again, against forgetting
MAX_WARMUP_SHARE = 0.5
ROUNDING_TOLERANCE = 1e-9
MODEL_VOCAB_MULTIPLE = 64  # the vocabulary of new weights with a trained tokenizer is padded to a multiple of it

Change = tuple[str, float]  # a value of a recipe by `section.key`, and another value for it


@dataclass(frozen=True)
class RunLength:
    """The resolved length of a run.

    Attributes:
        steps: optimizer steps.
        global_batch_size: windows of a step.
        epochs: times that the windows of the new data are read on average.
    """

    steps: int
    global_batch_size: int
    epochs: float


class RecipeUnfit(ValueError):
    """A recipe that does not fit the data at hand; the message says which value to change."""


def pad_vocab_size(num_tokens: int) -> int:
    """Return the vocabulary of new weights with a trained tokenizer of so many tokens.

    >>> pad_vocab_size(1000)
    1024
    """
    return -(-num_tokens // MODEL_VOCAB_MULTIPLE) * MODEL_VOCAB_MULTIPLE


def make_preset_model(recipe: Recipe) -> ModelConfig:
    """Return the shape of the recipe's preset; a tokenizer that is yet to be trained counts with its most tokens.

    Raises:
        RecipeUnfit: if the recipe trains the parent, whatever its shape.
    """
    if recipe.model.preset == "parent":
        raise RecipeUnfit(
            "the recipe trains the parent, whatever its shape; name a recipe with a preset, or the parent"
        )
    model = MODEL_PRESETS[recipe.model.preset]()
    vocab_size = recipe.model.tokenizer_vocab_size
    return model if vocab_size is None else replace(model, vocab_size=pad_vocab_size(vocab_size))


def list_trained_parts(recipe: Recipe, parts: Collection[str]) -> list[str]:
    """Return the parts with rows that are trained on: all, without the base if its share is 0 and there are others."""
    if recipe.data.replay_share == 0 and set(parts) - {REPLAY_PART}:
        return [part for part in parts if part != REPLAY_PART]
    return list(parts)


def resolve_part_weights(recipe: Recipe, windows: Mapping[str, int]) -> dict[str, float] | None:
    """Return the weight of each part that has windows; None: every window has the same weight.

    Args:
        windows: number of windows of each part that has some.

    Raises:
        RecipeUnfit: if a part with windows has no weight.
    """
    if recipe.data.replay_share is not None:
        places = resolve_part_places(recipe, windows)
        return None if places is None else {part: float(count) for part, count in places.items()}
    weights = recipe.mixture.weights
    if not weights:
        return None
    missing = sorted(windows.keys() - weights.keys())
    if missing:
        raise RecipeUnfit(f"[mixture] lacks {', '.join(missing)}, which have rows; give each a weight")
    return {part: weights[part] for part in windows}


def resolve_part_places(recipe: Recipe, windows: Mapping[str, int]) -> dict[str, int] | None:
    """Return each part's places in a block of the mixture where the replay share sets them; else None.

    A window of the new data has one place, so each is read once in a block, however few windows its part has.
    """
    share = recipe.data.replay_share
    num_new = sum(count for part, count in windows.items() if part != REPLAY_PART)
    if not share or not num_new or REPLAY_PART not in windows:
        return None
    return {**windows, REPLAY_PART: max(1, round(num_new * share / (1 - share)))}


def count_epoch_windows(windows: Mapping[str, int], weights: Mapping[str, float] | None) -> float:
    """Return how many windows of the mixture pass until those of the new data were read once on average.

    >>> count_epoch_windows({"datasets": 30, "base": 500}, {"datasets": 0.5, "base": 0.5})
    60.0
    """
    if weights is None:
        return float(sum(windows.values()))
    new = [part for part in windows if part != REPLAY_PART] or [REPLAY_PART]
    share = sum(weights[part] for part in new) / sum(weights[part] for part in windows)
    return sum(windows[part] for part in new) / share


def count_epochs_read(windows: Mapping[str, int], mean_epochs: Mapping[str, float]) -> float:
    """Return how often a window of the new data was read on average in earlier rounds.

    Args:
        mean_epochs: times that a window of each part was read on average; of a part that is left out, none.

    >>> count_epochs_read({"fixes": 10, "datasets": 30, "base": 500}, {"fixes": 0, "datasets": 2, "base": 9})
    1.5
    """
    new = [part for part in windows if part != REPLAY_PART] or [REPLAY_PART]
    num_reads = sum(windows[part] * mean_epochs.get(part, 0.0) for part in new)
    return num_reads / sum(windows[part] for part in new)


def resolve_length(recipe: Recipe, epoch_windows: float, *, epochs_read: float = 0.0) -> RunLength:
    """Return steps and batch of a run on data of a size.

    The batch of a recipe that leaves it out is the largest power of two within the recipe's bounds that gives at least
    the target number of steps, else the smallest within the bounds.

    Args:
        epoch_windows: see `count_epoch_windows`.
        epochs_read: see `count_epochs_read`; they count for a recipe that continues.

    Raises:
        RecipeUnfit: if the run would have too few steps or too many epochs.
    """
    earlier = epochs_read if recipe.run.kind == "continue" else 0.0
    run, num_epochs = _compute_length(recipe, epoch_windows, earlier)
    if _is_within_limits(recipe, run, num_epochs):
        return run
    length = recipe.length
    if run.steps < length.min_steps:
        batch = format_count(run.global_batch_size, "window")
        problem = f"would have {format_count(run.steps, 'step')} of {batch}, at least {length.min_steps} are needed"
    else:
        before = f" after {earlier:,.1f} times in earlier rounds" if earlier else ""
        problem = f"would read the new data {run.epochs:,.1f} times{before}, length.max_epochs is {length.max_epochs:g}"
    raise RecipeUnfit(
        f"the run {problem}: an epoch of the mixture has {format_count(round(epoch_windows), 'window')} of "
        f"{recipe.data.seq_len:,} tokens; {_advise(recipe, epoch_windows, earlier)}"
    )


def _compute_length(recipe: Recipe, epoch_windows: float, earlier: float) -> tuple[RunLength, float]:
    """Return steps and batch, and the epochs with those of earlier rounds: as wanted, not rounded to whole steps."""
    size = recipe.batch.global_batch_size or _choose_batch_size(recipe, epoch_windows)
    wanted_windows = recipe.length.steps * size if recipe.length.steps else _count_run_windows(recipe, epoch_windows)
    steps = max(1, round(wanted_windows / size))
    return RunLength(steps, size, steps * size / epoch_windows), wanted_windows / epoch_windows + earlier


def _is_within_limits(recipe: Recipe, run: RunLength, num_epochs: float) -> bool:
    length = recipe.length
    return run.steps >= length.min_steps and num_epochs <= length.max_epochs * (1 + ROUNDING_TOLERANCE)


def _advise(recipe: Recipe, epoch_windows: float, earlier: float) -> str:
    """Return the changes of one value, or else of both limits, with which the run is within its limits."""
    run, num_epochs = _compute_length(recipe, epoch_windows, earlier)
    is_too_short = run.steps < recipe.length.min_steps
    if is_too_short:
        changes = _list_longer_runs(recipe, epoch_windows, run)
    else:
        changes = _list_shorter_runs(recipe, epoch_windows, (recipe.length.max_epochs - earlier) * epoch_windows, run)
    min_steps = ("length.min_steps", min(run.steps, recipe.length.min_steps))
    max_epochs = ("length.max_epochs", math.ceil(num_epochs * 10) / 10)
    alternatives: list[tuple[Change, ...]] = [(change,) for change in (*changes, min_steps, max_epochs)]
    helpful = [change for change in alternatives if _helps(recipe, change, epoch_windows, earlier)]
    if not helpful and _helps(recipe, (min_steps, max_epochs), epoch_windows, earlier):
        helpful = [(min_steps, max_epochs)]

    values = recipe.list_values()
    ways_out = [
        " and ".join(f"{'lower' if value < values[place] else 'raise'} {place} to {value}" for place, value in change)
        for change in helpful
    ]
    if recipe.length.epochs is not None or not is_too_short or not ways_out:
        ways_out.insert(0, "add data")
    return " or ".join([", ".join(ways_out[:-1]), ways_out[-1]] if len(ways_out) > 1 else ways_out)


def _list_longer_runs(recipe: Recipe, epoch_windows: float, run: RunLength) -> list[Change]:
    """Return changes of length and batch that may give the least number of steps."""
    batch, length = recipe.batch, recipe.length
    if length.steps is not None:
        return [("length.steps", length.min_steps)]
    needed_windows = length.min_steps * run.global_batch_size
    smaller_size = int(_count_run_windows(recipe, epoch_windows) / length.min_steps)
    smaller_size -= smaller_size % (batch.micro_batch_size or 1)
    return [
        ("batch.min_global_batch_size" if batch.global_batch_size is None else "batch.global_batch_size", smaller_size),
        ("batch.target_steps", max(batch.target_steps, length.min_steps)),
        ("length.tokens", needed_windows * recipe.data.seq_len)
        if length.tokens is not None
        else ("length.epochs", math.ceil(needed_windows / epoch_windows * 100) / 100),
    ]


def _list_shorter_runs(recipe: Recipe, epoch_windows: float, max_windows: float, run: RunLength) -> list[Change]:
    """Return changes of length and batch with which a run may read at most so many windows."""
    batch, length = recipe.batch, recipe.length
    if length.tokens is not None:
        return [("length.tokens", int(max_windows) * recipe.data.seq_len)]
    if length.epochs is not None:
        return [("length.epochs", math.floor(max_windows / epoch_windows * 100) / 100)]
    smaller_size = int(max_windows / run.steps)
    smaller_size -= smaller_size % (batch.micro_batch_size or 1)
    size_place = "batch.max_global_batch_size" if batch.global_batch_size is None else "batch.global_batch_size"
    return [("length.steps", int(max_windows / run.global_batch_size)), (size_place, smaller_size)]


def _helps(recipe: Recipe, changes: Sequence[Change], epoch_windows: float, earlier: float) -> bool:
    """Return True if the recipe changes, is valid with the changes, and gives a run within its limits."""
    overrides: dict[str, dict[str, float]] = {}
    for place, value in changes:
        section, _, key = place.partition(".")
        overrides.setdefault(section, {})[key] = value
    try:
        changed = override_recipe(recipe, "changed", overrides)
    except ValueError:
        return False
    return _is_within_limits(changed, *_compute_length(changed, epoch_windows, earlier))


def _count_run_windows(recipe: Recipe, epoch_windows: float) -> float:
    """Return the windows of a run whose length is in epochs or tokens."""
    length = recipe.length
    if length.epochs is not None:
        return length.epochs * epoch_windows
    assert length.tokens is not None, "one of steps, tokens and epochs is set"
    return length.tokens / recipe.data.seq_len


def _choose_batch_size(recipe: Recipe, epoch_windows: float) -> int:
    batch = recipe.batch
    if recipe.length.steps is not None:
        return batch.max_global_batch_size
    size = _count_run_windows(recipe, epoch_windows) / batch.target_steps
    power: int = 2 ** math.floor(math.log2(max(size, 1)))
    return min(max(power, batch.min_global_batch_size), batch.max_global_batch_size)


def build_train_config(
    recipe: Recipe,
    length: RunLength,
    plan: PipelinePlan,
    *,
    can_validate: bool = False,
    is_saving_asynchronous: bool = True,
) -> TrainConfig:
    """Return the settings of a run from a recipe whose length and plan are decided.

    Args:
        can_validate: there are windows to validate on.
        is_saving_asynchronous: the nodes have the memory for copies of the states; see `yuan.run_estimate`.
    """
    validation = recipe.validation
    schedule, optimizer, guard = recipe.schedule, recipe.optimizer, recipe.guard
    return TrainConfig(
        max_steps=length.steps,
        learning_rate=schedule.learning_rate,
        seq_len=recipe.data.seq_len,
        micro_batch_size=plan.micro_batch_size,
        global_batch_size=length.global_batch_size,
        schedule=schedule.kind,
        warmup_steps=min(schedule.warmup_steps, int(length.steps * MAX_WARMUP_SHARE)),
        decay_share=schedule.decay_share,
        final_lr_ratio=schedule.final_lr_ratio,
        weight_decay=optimizer.weight_decay,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        grad_clip=optimizer.grad_clip,
        precision="bf16" if plan.precision == "bf16" else "fp32",
        isolate_documents=recipe.data.isolate_documents,
        checkpoint_every=recipe.checkpoints.every_steps,
        store_every=recipe.checkpoints.store_every_steps,
        is_saving_asynchronous=is_saving_asynchronous,
        validate_every=min(validation.every_steps, length.steps) if can_validate else None,
        max_validation_windows=validation.max_windows,
        patience=validation.patience if can_validate else None,
        spike_sigmas=guard.spike_sigmas,
        max_skips=guard.max_skips,
        max_rollbacks=guard.max_rollbacks,
        step_limit_s=guard.step_limit_s,
    )
