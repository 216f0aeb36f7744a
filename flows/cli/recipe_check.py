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
from yuan.plan.memory_model import GIB
from yuan.plan.pool import Pool
from yuan.recipe_resolution import make_preset_model
from yuan.run_estimate import RunEstimate, estimate_run


def estimate_round(name: str, overrides: Mapping[str, Mapping[str, Any]], pool: str | None) -> RunEstimate:
    """Estimate the run of a round by a recipe.

    Args:
        overrides: values that replace those of the recipe, by section and key.
        pool: FILE[:NAME]; None: the pool that rounds are planned for.

    Raises:
        BadParameter: if an override is not valid: exit status 2.
        ValueError: if there is no such recipe or pool, or the recipe contradicts itself.
    """
    parameters = build_form(RoundParameters, {"recipe": name, "overrides": overrides})
    recipe = parameters.apply_to(load_recipe(get_home_folder(), name), name)
    devices = _load_own_pool() if pool is None else load_pool_option(pool)
    return estimate_run(
        name,
        recipe,
        make_preset_model(recipe),
        devices,
        precision=choose_precision(recipe.model.precision, devices),
        limits=make_plan_limits(devices, recipe.batch.micro_batch_size),
    )


def _load_own_pool() -> Pool:
    """Return the pool that rounds are planned for, with the free disk of the home folder if it names none."""
    pool = load_configured_pool(load_settings(PoolSettings))
    if pool.disk_gib is not None:
        return pool
    home = get_home_folder()
    existing_folder = next(folder for folder in (home, *home.parents) if folder.exists())
    return replace(pool, disk_gib=shutil.disk_usage(existing_folder).free / GIB)
