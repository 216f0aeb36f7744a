"""Estimate what a run by a recipe needs on a pool, before any device is taken: memory, disk, transfers, time."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from yuan.checkpoint_estimate import (
    RestartEstimate,
    SavingEstimate,
    TransferEstimate,
    count_stored_checkpoints,
    estimate_checkpoint_bytes,
    estimate_restart,
    estimate_saving,
    estimate_transfer,
)
from yuan.config import ModelConfig, Precision, format_count, format_duration
from yuan.data.tokens import BYTES_PER_TOKEN
from yuan.node_memory import (
    MASTER_BYTES,
    STATE_BYTES,
    SYNCHRONOUS_NOTE,
    NodeEstimate,
    estimate_main_memory,
)
from yuan.plan.generation_stages import (
    choose_generation_devices,
    compute_serving_room_gib,
    has_serving_room,
    list_served_models,
)
from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import make_run_plan
from yuan.plan.pool import Pool
from yuan.plan.search import SizeLimits
from yuan.plan.workload import Workload, compute_default_loss_block
from yuan.recipe import Recipe
from yuan.recipe_resolution import (
    REPLAY_PART,
    RecipeUnfit,
    RunLength,
    count_epoch_windows,
    count_epochs_read,
    list_trained_parts,
    resolve_length,
    resolve_part_weights,
)

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
FORWARD_SHARE = 1 / 3  # of a step's compute, which a validation runs alone
CACHED_VERSIONS = 2  # that serving and evaluation hold on disk: the champion and a candidate
KEPT_STATES = 2  # versions whose masters, or masters and moments, the store holds: the champion and the one before

SHORT_UPLOAD_S = 60.0  # that nobody waits for
MANY_REPLAYS = 20  # readings of a row of the base in one run, above which the check notes them

RateSource = Literal["calibrated", "data sheets"]


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """The size of the data that a run would read.

    Attributes:
        windows: number of windows of each part that has rows.
        num_stored_bytes: bytes of the snapshot in the object store.
        mean_epochs: times that a window of each part was read on average in earlier rounds.
        source: how it is known, for a reader.
    """

    windows: Mapping[str, float]
    num_stored_bytes: int
    source: str
    mean_epochs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """The length of a run, and its time.

    Attributes:
        tokens: of all windows, padding included.
        hours: of steps, validations, and what checkpoints cost.
        device_hours: hours times the devices that the plan uses.
    """

    steps: int
    global_batch_size: int
    epochs: float | None
    tokens: int
    step_seconds: float
    hours: float
    device_hours: float
    rates: RateSource


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """The needs of a run, and the limits that it exceeds.

    Attributes:
        data: the size of the data it was computed for.
        disk_terms, store_terms: bytes by name, on the shared disk and in the object store.
        is_saving_asynchronous: checkpoints are copied and written while training continues.
        problems: why the run would be refused or fail, each with what to change; none if it fits.
        notes: what a reader should know besides.
    """

    recipe: str
    model: ModelConfig
    pool: Pool
    data: DataSize | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    plan: PipelinePlan | None = None
    nodes: tuple[NodeEstimate, ...] = ()
    disk_terms: Mapping[str, int] = field(default_factory=dict)
    store_terms: Mapping[str, int] = field(default_factory=dict)
    saving: SavingEstimate | None = None
    transfer: TransferEstimate | None = None
    restart: RestartEstimate | None = None
    time: TimeEstimate | None = None
    is_saving_asynchronous: bool = True

    @property
    def fits(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the estimate with its sums; sizes in bytes. Without a plan there are problems and notes only."""
        result: dict[str, Any] = {
            "recipe": self.recipe,
            "model": self.model.name,
            "parameters": self.model.num_parameters,
            "pool": self.pool.name,
            "fits": self.fits,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "data": None if self.data is None else asdict(self.data),
        }
        if self.plan is None or self.time is None:
            return result
        assert self.saving is not None and self.transfer is not None and self.restart is not None, "of every plan"
        return {
            **result,
            "time": asdict(self.time),
            "plan": self.plan.to_json(),
            "nodes": [{**asdict(node), "host_bytes": node.host_bytes} for node in self.nodes],
            "host_bytes": sum(node.host_bytes for node in self.nodes),
            "is_saving_asynchronous": self.is_saving_asynchronous,
            "disk_bytes": sum(self.disk_terms.values()),
            "disk_terms": dict(self.disk_terms),
            "store_bytes": sum(self.store_terms.values()),
            "store_terms": dict(self.store_terms),
            "saving": asdict(self.saving),
            "transfer": {**asdict(self.transfer), "link_share": self.transfer.link_share},
            "restart": {**asdict(self.restart), "seconds": self.restart.seconds},
        }


def estimate_run(
    name: str,
    recipe: Recipe,
    model: ModelConfig,
    pool: Pool,
    *,
    precision: Precision,
    data: DataSize | None = None,
    limits: SizeLimits = SizeLimits(),
) -> RunEstimate:
    """Estimate a run by a recipe; it is planned on the pool as a round's run is.

    Args:
        name: of the recipe, for messages.
        data: the size of the data; without it, a recipe whose length follows from the data is estimated for its target
            number of steps, of the largest batch.
        limits: sizes that a plan must have; see `make_plan`.
    """
    problems: list[str] = []
    notes: list[str] = []
    length = _resolve_run_length(recipe, data, problems, notes)
    plan = _plan_run(recipe, model, pool, precision, limits, length, problems)
    if plan is None:
        return RunEstimate(recipe=name, model=model, pool=pool, data=data, problems=tuple(problems), notes=tuple(notes))

    _note_serving(plan, pool, model, notes)
    room = estimate_main_memory(plan, model, pool)
    nodes = room.nodes
    notes += [] if room.is_saving_asynchronous else [SYNCHRONOUS_NOTE]
    problems += [] if room.problem is None else [room.problem]
    disk_terms = _estimate_disk(recipe, model, length, data)
    _check_disk(pool, disk_terms, problems)
    version_bytes = model.num_parameters * DTYPE_BYTES[recipe.model.version_dtype]
    saving = estimate_saving(
        recipe, model, pool, plan, length.steps, nodes, is_asynchronous=room.is_saving_asynchronous
    )
    transfer = estimate_transfer(recipe, model, pool, plan, length.steps, saving)
    _note_slow_upload(transfer, plan, length, notes)
    return RunEstimate(
        recipe=name,
        model=model,
        pool=pool,
        data=data,
        plan=plan,
        nodes=nodes,
        disk_terms=disk_terms,
        store_terms=_estimate_store(recipe, model, length, data, transfer, version_bytes),
        saving=saving,
        transfer=transfer,
        restart=estimate_restart(model, pool, plan, nodes, saving, transfer),
        time=_estimate_time(recipe, pool, plan, length, data, saving),
        is_saving_asynchronous=room.is_saving_asynchronous,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _resolve_run_length(recipe: Recipe, data: DataSize | None, problems: list[str], notes: list[str]) -> RunLength:
    """Return steps and batch; a run that the recipe refuses is a problem, and is estimated all the same."""
    if data is None:
        return _assume_length(recipe, problems, notes)
    windows = {part: round(data.windows[part]) for part in list_trained_parts(recipe, data.windows)}
    try:
        weights = resolve_part_weights(recipe, windows)
        epoch_windows = count_epoch_windows(windows, weights)
    except RecipeUnfit as error:
        problems.append(str(error))
        epoch_windows = sum(windows.values())
    try:
        length = resolve_length(recipe, epoch_windows, epochs_read=count_epochs_read(windows, data.mean_epochs))
        _note_repeated_replay(windows, weights, length, notes)
        return length
    except RecipeUnfit as error:
        problems.append(str(error))
    unbounded = recipe.length.model_copy(update={"min_steps": 1, "max_epochs": math.inf})
    return resolve_length(recipe.model_copy(update={"length": unbounded}), epoch_windows)


def _note_repeated_replay(
    windows: Mapping[str, int], weights: Mapping[str, float] | None, length: RunLength, notes: list[str]
) -> None:
    if weights is None or not windows.get(REPLAY_PART):
        return
    share = weights[REPLAY_PART] / sum(weights.values())
    num_reads = length.steps * length.global_batch_size * share / windows[REPLAY_PART]
    if num_reads > MANY_REPLAYS:
        notes.append(
            f"the base has {windows[REPLAY_PART]:,} windows, and the run would read each {num_reads:,.0f} times; push "
            "more rows with the purpose base, or lower data.replay_share"
        )


def _assume_length(recipe: Recipe, problems: list[str], notes: list[str]) -> RunLength:
    """Return steps and batch without data: the recipe's own, or its target number of steps."""
    batch, length = recipe.batch, recipe.length
    size = batch.global_batch_size or batch.max_global_batch_size
    if length.epochs is not None:
        num_reads = "once" if length.epochs == 1 else f"{length.epochs:g} times"
        notes.append(
            f"without --snapshot, data for {format_count(batch.target_steps, 'step')} of "
            f"{format_count(size, 'window')} is assumed: {batch.target_steps * size / length.epochs:,.0f} windows of "
            f"the mixture, read {num_reads}"
        )
        if batch.target_steps < length.min_steps:
            problems.append(
                f"batch.target_steps is {batch.target_steps}, at least {length.min_steps} are needed; raise it, or "
                "lower length.min_steps"
            )
        return RunLength(batch.target_steps, size, length.epochs)
    steps = length.steps or max(1, round((length.tokens or 0) / recipe.data.seq_len / size))
    if steps < length.min_steps:
        problems.append(
            f"the run would have {format_count(steps, 'step')}, at least {length.min_steps} are needed; raise the "
            "length, or lower length.min_steps"
        )
    return RunLength(steps, size, math.nan)


def _plan_run(
    recipe: Recipe,
    model: ModelConfig,
    pool: Pool,
    precision: Precision,
    limits: SizeLimits,
    length: RunLength,
    problems: list[str],
) -> PipelinePlan | None:
    """Return the run's plan, also one that does not fit; None if there cannot be one, which is a problem."""
    try:
        work = Workload(
            model=model,
            seq_len=recipe.data.seq_len,
            global_batch_size=length.global_batch_size,
            precision=precision,
            loss_block=compute_default_loss_block(model),
            isolate_documents=recipe.data.isolate_documents,
        )
        plan = make_run_plan(work, pool, limits)
    except ValueError as error:
        problems.append(str(error))
        return None
    if not plan.feasible:
        problems.append(plan.explanation)
    return plan


def _note_serving(plan: PipelinePlan, pool: Pool, model: ModelConfig, notes: list[str]) -> None:
    """Say how the model server shares the plan's devices, if it does."""
    served = list_served_models(model, plan.precision, champion=None)
    if has_serving_room(plan, pool, served):
        devices = choose_generation_devices(pool, model, value_bytes=served[0].value_bytes)
        room_gib = compute_serving_room_gib(pool, served[0], devices)
        notes.append(
            f"{room_gib:.1f} GiB of each device are kept for the model server, which shares them (serving = "
            f'"{pool.serving}"); the table counts them as reserve'
        )
    elif pool.uses_devices_for_serving and pool.serving != "own":
        notes.append("the model server yields its device to the run, and answers with 503 and the time until then")


def estimate_growing_bytes(recipe: Recipe, model: ModelConfig, *, has_local_store: bool) -> int:
    """Return the bytes that a prepared run writes on the home folder's disk: checkpoints and the exported weights.

    Args:
        has_local_store: the object store, which gets copies of both, is on this disk too.
    """
    version_bytes = DTYPE_BYTES[recipe.model.version_dtype] * model.num_parameters
    num_bytes = estimate_checkpoint_bytes(model) + version_bytes
    if has_local_store:
        num_stored = count_stored_checkpoints(1, 1, exports_best=recipe.validation.share > 0)  # of the shortest run
        num_bytes += num_stored * STATE_BYTES * model.num_parameters + version_bytes
    return num_bytes


def _estimate_disk(recipe: Recipe, model: ModelConfig, length: RunLength, data: DataSize | None) -> dict[str, int]:
    parameters = model.num_parameters
    version_bytes = parameters * DTYPE_BYTES[recipe.model.version_dtype]
    windows = length.steps * length.global_batch_size
    epochs = 1.0 if math.isnan(length.epochs) else max(length.epochs, 1.0)
    has_parent = recipe.model.weights != "new"
    num_windows = windows / epochs if data is None else sum(data.windows.values())  # all are written, however few read
    token_bytes = int(num_windows * (recipe.data.seq_len + 1) * BYTES_PER_TOKEN)
    return {
        "checkpoints": estimate_checkpoint_bytes(model),
        "parent_masters": (STATE_BYTES if recipe.optimizer.state == "parent" else MASTER_BYTES)
        * parameters
        * has_parent,
        "export": version_bytes,
        "token_files": token_bytes,
        "cached_token_files": token_bytes,
        "cached_versions": CACHED_VERSIONS * version_bytes,
    }


def _check_disk(pool: Pool, terms: Mapping[str, int], problems: list[str]) -> None:
    needed = sum(terms.values())
    if pool.disk_gib is not None and needed > pool.disk_gib * GIB:
        largest = max(terms, key=lambda name: terms[name])
        problems.append(
            f"the run needs {needed / GIB:,.1f} GiB of disk, disk_gib of {pool.name} is {pool.disk_gib:,.1f}; the "
            f"largest part is {largest.replace('_', ' ')}, {terms[largest] / GIB:,.1f} GiB; free space, or move the "
            "home folder to a larger disk"
        )


def _estimate_store(
    recipe: Recipe,
    model: ModelConfig,
    length: RunLength,
    data: DataSize | None,
    transfer: TransferEstimate,
    version_bytes: int,
) -> dict[str, int]:
    exports_best = recipe.validation.share > 0
    num_checkpoints = count_stored_checkpoints(length.steps, transfer.interval_steps, exports_best=exports_best)
    kept_bytes = MASTER_BYTES if recipe.run.kind == "finetune" else STATE_BYTES
    return {
        "snapshot": 0 if data is None else data.num_stored_bytes,
        "checkpoints": num_checkpoints * STATE_BYTES * model.num_parameters,
        "version": version_bytes,
        "masters": KEPT_STATES * kept_bytes * model.num_parameters,
    }


def _note_slow_upload(transfer: TransferEstimate, plan: PipelinePlan, length: RunLength, notes: list[str]) -> None:
    if transfer.seconds > max(length.steps * plan.step_seconds, SHORT_UPLOAD_S):
        notes.append(
            f"the upload of a checkpoint takes {format_duration(transfer.seconds)}, longer than the training, and a "
            "run ends when its last one is stored; a faster link to the object store (store_gb_s) shortens it"
        )


def _estimate_time(
    recipe: Recipe,
    pool: Pool,
    plan: PipelinePlan,
    length: RunLength,
    data: DataSize | None,
    saving: SavingEstimate,
) -> TimeEstimate:
    validation = recipe.validation
    num_validations = length.steps // validation.every_steps + 1 if validation.share else 0
    available = math.inf if data is None else validation.share * sum(data.windows.values())
    windows = min(validation.max_windows, available)
    window_seconds = plan.step_seconds / length.global_batch_size
    seconds = length.steps * plan.step_seconds + num_validations * windows * window_seconds * FORWARD_SHARE
    seconds += saving.num_saves * saving.cost_seconds

    used = {stage.device_class for stage in plan.stages}
    is_calibrated = all(group.measured is not None for group in pool.groups if group.device_class in used)
    return TimeEstimate(
        steps=length.steps,
        global_batch_size=length.global_batch_size,
        epochs=None if math.isnan(length.epochs) else length.epochs,
        tokens=length.steps * length.global_batch_size * recipe.data.seq_len,
        step_seconds=plan.step_seconds,
        hours=seconds / 3600,
        device_hours=seconds / 3600 * plan.num_ranks,
        rates="calibrated" if is_calibrated else "data sheets",
    )
