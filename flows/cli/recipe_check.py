"""The estimate of `cotrain recipe check`."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from feedback.contracts import RoundParameters
from flows.cli.output import build_form
from flows.cli.plan_options import load_pool_option
from flows.recipe_files import load_recipe
from flows.supervisor.pool_launcher import choose_precision, load_configured_pool, make_plan_limits
from infra.settings import PoolSettings, get_home_folder, load_settings
from yuan.config import ModelConfig
from yuan.plan.memory_model import GIB
from yuan.plan.pool import Pool
from yuan.recipe import Recipe
from yuan.recipe_resolution import make_preset_model
from yuan.run_estimate import DataSize, RunEstimate, estimate_run


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
        ValueError: if there is no such recipe, pool or snapshot, the recipe contradicts itself, or the stack is not up.
    """
    parameters = build_form(RoundParameters, {"recipe": name, "overrides": overrides})
    recipe = parameters.apply_to(load_recipe(get_home_folder(), name), name)
    devices = _load_own_pool() if pool is None else load_pool_option(pool)
    model, data = _find_model_and_data(recipe, snapshot_id)
    return estimate_run(
        name,
        recipe,
        model,
        devices,
        data=data,
        precision=choose_precision(recipe.model.precision, devices),
        limits=make_plan_limits(devices, recipe.batch.micro_batch_size),
    )


def _find_model_and_data(recipe: Recipe, snapshot_id: str | None) -> tuple[ModelConfig, DataSize | None]:
    if snapshot_id is None and recipe.model.preset != "parent":
        return make_preset_model(recipe), None
    # The clients of the stack's servers take seconds to import.
    from flows.context import open_operator_context
    from flows.snapshot_size import find_round_model, measure_snapshot

    context = open_operator_context()
    if snapshot_id is None:
        return find_round_model(context, recipe, iter(())).config, None
    return measure_snapshot(context, recipe, snapshot_id)


def _load_own_pool() -> Pool:
    """Return the pool that rounds are planned for, with the free disk of the home folder if it names none."""
    pool = load_configured_pool(load_settings(PoolSettings))
    if pool.disk_gib is not None:
        return pool
    home = get_home_folder()
    existing_folder = next(folder for folder in (home, *home.parents) if folder.exists())
    return replace(pool, disk_gib=shutil.disk_usage(existing_folder).free / GIB)
