"""The estimate of `cotrain recipe check`."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from feedback.contracts import RoundParameters
from flows.cli.output import build_form
from flows.cli.plan_options import load_pool_option
from flows.recipe_files import CUSTOM_RECIPES_FOLDER, find_recipe_file, load_recipe
from flows.supervisor.pool_launcher import choose_precision, load_configured_pool, make_plan_limits
from infra.settings import PoolSettings, get_home_folder, load_settings
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.plan.memory_model import GIB
from yuan.plan.pool import Pool
from yuan.recipe import TRAINED_TOKENIZER, Recipe
from yuan.recipe_resolution import RecipeUnfit, make_preset_model
from yuan.run_estimate import DataSize, RunEstimate, estimate_run
from yuan.tokenizer import TOKENIZER_MODEL_FILE


def estimate_round(
    name: str, overrides: Mapping[str, Mapping[str, Any]], pool: str | None, snapshot_id: str | None
) -> RunEstimate:
    """Estimate the run of a round by a recipe; needs the stack for a snapshot, and for the shape of the champion.

    Args:
        overrides: values that replace those of the recipe, by section and key.
        pool: FILE[:NAME]; None: the pool that rounds are planned for.
        snapshot_id: id of the snapshot that the run would read; None: the data is assumed.

    Raises:
        BadParameter: if an override is not valid: exit status 2.
        ValueError: if there is no such recipe, pool or snapshot, or the stack is not up.
        RecipeUnfit: if the recipe contradicts itself, or its tokenizer does not fit.
    """
    parameters = build_form(RoundParameters, {"recipe": name, "overrides": overrides})
    find_recipe_file(get_home_folder(), name)
    try:
        recipe = parameters.apply_to(load_recipe(get_home_folder(), name), name)
    except ValueError as error:
        raise RecipeUnfit(str(error)) from None
    devices = _load_own_pool() if pool is None else load_pool_option(pool)
    model, data = _find_model_and_data(recipe, snapshot_id)
    note = _check_tokenizer(recipe, model)
    estimate = estimate_run(
        name,
        recipe,
        model,
        devices,
        data=data,
        precision=choose_precision(recipe.model.precision, devices),
        limits=make_plan_limits(devices, recipe.batch.micro_batch_size),
    )
    return estimate if note is None else replace(estimate, notes=(*estimate.notes, note))


def _check_tokenizer(recipe: Recipe, model: ModelConfig) -> str | None:
    """Check the tokenizer of new weights against the model; return a note if it is yet to be put there.

    Raises:
        RecipeUnfit: if it cannot be read, or has more tokens than the model.
    """
    if recipe.model.weights == "parent" or recipe.model.tokenizer == TRAINED_TOKENIZER:
        return None
    folder = get_home_folder() / CUSTOM_RECIPES_FOLDER / recipe.model.tokenizer
    if not (folder / TOKENIZER_MODEL_FILE).exists():
        return f"new weights need a tokenizer: put {TOKENIZER_MODEL_FILE} into {folder}"
    try:
        tokenizers.load(folder).check_fits(model.vocab_size)
    except ValueError as error:
        raise RecipeUnfit(f"the tokenizer of new weights of {model.name}: {error}") from None
    return None


def _find_model_and_data(recipe: Recipe, snapshot_id: str | None) -> tuple[ModelConfig, DataSize | None]:
    if snapshot_id is None and recipe.model.preset != "parent":
        return make_preset_model(recipe), None
    # The clients of the stack's servers take seconds to import.
    from flows.context import open_operator_context
    from flows.round.run_model import RoundUnfit
    from flows.snapshot_size import find_round_model, measure_snapshot

    context = open_operator_context()
    try:
        if snapshot_id is None:
            return find_round_model(context, recipe, iter(())).config, None
        return measure_snapshot(context, recipe, snapshot_id)
    except RoundUnfit as error:
        raise RecipeUnfit(str(error)) from None


def _load_own_pool() -> Pool:
    """Return the pool that rounds are planned for, with the free disk of the home folder if it names none."""
    pool = load_configured_pool(load_settings(PoolSettings))
    if pool.disk_gib is not None:
        return pool
    home = get_home_folder()
    existing_folder = next(folder for folder in (home, *home.parents) if folder.exists())
    return replace(pool, disk_gib=shutil.disk_usage(existing_folder).free / GIB)
