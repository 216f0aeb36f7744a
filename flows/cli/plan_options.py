"""Options of `cotrain plan` and `calibrate`: models, pools and their changes, plans."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from infra.gpus import list_gpu_models
from yuan.config import MAX_SUGGESTED_NAME_CHARS, MODEL_PRESETS, ModelConfig, Precision
from yuan.data.text import BadJson, parse_json
from yuan.plan.current_plan import parse_current_plan
from yuan.plan.json_fields import show_value
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.pool import Pool
from yuan.plan.pool_changes import apply_pool_change
from yuan.plan.pool_file import load_pool, make_local_pool
from yuan.plan.workload import Workload
from yuan.safe_files import read_regular_file

MAX_PLAN_BYTES = 16 * 2**20

ModelNameOption = Annotated[str, typer.Option(help=f"one of {', '.join(MODEL_PRESETS)}")]
PoolFileOption = Annotated[
    str | None, typer.Option(help="FILE[:NAME] of a pool, or cpu; default: the devices of this machine")
]
PrecisionOption = Annotated[Precision, typer.Option(help="number format of the model's computation")]
SeqLenOption = Annotated[int | None, typer.Option(min=1, help="default: the model's")]
DeviceChangesOption = Annotated[list[str] | None, typer.Option(help="CLASS:N, devices of a class; may be repeated")]


def get_model_option(name: str) -> ModelConfig:
    """Return the model of an option `--model`; an unknown one gives one line and status 2."""
    if name not in MODEL_PRESETS:
        rule = f"must be one of {', '.join(MODEL_PRESETS)}, got {name[:MAX_SUGGESTED_NAME_CHARS]!r}; choose one"
        raise typer.BadParameter(rule, param_hint=["--model"])
    return MODEL_PRESETS[name]()


def read_current_plan_option(file: Path, work: Workload, pools: Sequence[Pool]) -> PipelinePlan:
    """Read the plan of an option `--current`.

    Args:
        pools: the pool before and after its changes.

    Raises:
        ValueError: if the file cannot be read, or holds no plan of the given training on devices of the pools.
    """
    try:
        content = read_regular_file(file, MAX_PLAN_BYTES)
        plan = parse_current_plan(parse_json(content), work)
    except OSError as error:
        raise ValueError(
            f"--current {file} cannot be read: {error.strerror}; write it with `cotrain plan --json`"
        ) from None
    except BadJson as error:
        place = f"{error.place} " if error.place else ""
        raise ValueError(f"--current {file}: {place}{error}; write it with `cotrain plan --json`") from None
    except ValueError as error:
        raise ValueError(f"--current {file}: {error}") from None
    classes = {group.device_class for pool in pools for group in pool.groups}
    if foreign := [name for name in plan.device_counts if name not in classes]:
        raise ValueError(
            f"--current {file}: the plan uses devices of {', '.join(map(show_value, foreign))}, and the pool has "
            f"{', '.join(map(show_value, sorted(classes)))}; pass the pool that it was planned for, and name what "
            "changed with --lost or --added"
        )
    return plan


def change_pool(pool: Pool, *, lost: Sequence[str], added: Sequence[str], slow: Sequence[str]) -> Pool:
    """Apply the options `--lost`, `--added` and `--slow` to a pool; an invalid one gives one line and status 2."""
    kinds: tuple[tuple[Literal["lost", "added", "slow"], Sequence[str]], ...]
    kinds = (("lost", lost), ("added", added), ("slow", slow))
    for kind, changes in kinds:
        for change in changes:
            try:
                pool = apply_pool_change(pool, kind, change)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint=[f"--{kind}"]) from None
    return pool


def load_pool_option(spec: str | None) -> Pool:
    """Load the pool of an option `--pool`; without one, the devices of this machine."""
    if spec is None:
        return make_local_pool(list_gpu_models())
    if not spec.strip():
        rule = "must name a pool file as FILE or FILE:NAME, got an empty text; leave it out for this machine"
        raise typer.BadParameter(rule, param_hint=["--pool"])
    return load_pool(spec)
