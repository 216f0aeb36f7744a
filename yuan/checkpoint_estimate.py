"""Estimate what the checkpoints of a run cost before it starts: time to save, upload and restart, room for them.

The intervals are those that a run chooses: `yuan.train.checkpoint_interval` decides both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from yuan.config import KEEP_CHECKPOINTS, NUM_STORED_CHECKPOINTS, ModelConfig
from yuan.node_memory import MASTER_BYTES, STATE_BYTES, NodeEstimate, count_rank_state_bytes, count_stage_parameters
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.pool import CPU_POOL_NAME, Pool
from yuan.plan.replan import RESTART_ESTIMATE_S
from yuan.plan.time_model import GIGA
from yuan.recipe import Recipe
from yuan.train.checkpoint_interval import (
    compute_interval_steps,
    compute_saving_cost_s,
    compute_upload_pause_s,
)

ASSUMED_DISK_GB_S = 1.0  # of one node, where the pool does not say
ASSUMED_STORE_GB_S = 0.125  # 1 Gb/s, where the pool does not say
ASSUMED_COPY_GB_S = 2.0  # from one device to main memory, during which training waits
HASH_GB_S = 1.4  # sha256 of one process, measured on one core with SHA instructions


@dataclass(frozen=True, kw_only=True)
class SavingEstimate:
    """The checkpoints on disk.

    Attributes:
        interval_steps: the most steps between two.
        chosen_steps: the interval that the run chooses; None if the recipe gives one.
        blocked_seconds: for which one stops training.
        write_seconds: until its files are written and hashed.
        cost_seconds: that training loses by one.
        num_saves: while the run trains, the one before the first step included.
    """

    interval_steps: int
    chosen_steps: int | None
    blocked_seconds: float
    write_seconds: float
    cost_seconds: float
    num_saves: int


@dataclass(frozen=True, kw_only=True)
class TransferEstimate:
    """Bytes that pass between a run's disk and the object store.

    Attributes:
        interval_steps: between two checkpoints that are uploaded.
        seconds: to upload one.
        bytes_per_hour: of checkpoints, while the run trains.
        link_share: fraction of the link that they take.
    """

    interval_steps: int
    seconds: float
    bytes_per_hour: float
    link_gb_s: float
    is_link_assumed: bool

    @property
    def link_share(self) -> float:
        return self.bytes_per_hour / 3600 / (self.link_gb_s * GIGA)


@dataclass(frozen=True, kw_only=True)
class RestartEstimate:
    """The time that a run loses when a process or node fails.

    Attributes:
        interval_steps: between two checkpoints on disk.
        read_seconds: to read and verify the newest checkpoint, on the node that takes longest.
        lost_seconds: of the steps since that checkpoint, on average.
        lost_disk_seconds: of the steps since the last uploaded one, on average, if the disk is lost as well.
    """

    interval_steps: int
    start_seconds: float
    read_seconds: float
    lost_seconds: float
    lost_disk_seconds: float
    disk_gb_s: float
    is_disk_assumed: bool

    @property
    def seconds(self) -> float:
        return self.start_seconds + self.read_seconds + self.lost_seconds


def estimate_saving(
    recipe: Recipe,
    model: ModelConfig,
    pool: Pool,
    plan: PipelinePlan,
    num_steps: int,
    nodes: Sequence[NodeEstimate],
    *,
    is_asynchronous: bool,
) -> SavingEstimate:
    """Estimate how often checkpoints are saved on disk, and what one costs; each validation saves one as well.

    Args:
        is_asynchronous: training waits for copies of the states only, not until they are written.
    """
    states = [count_rank_state_bytes(plan, model, n) for n in range(plan.pipeline_size)]
    rate = (pool.disk_gb_s or ASSUMED_DISK_GB_S) * GIGA
    # A rank hashes its files when they are written, at the same time as the other ranks.
    write_s = max(sum(states[n - 1] for n in node.stages) for node in nodes) / rate + max(states) / (HASH_GB_S * GIGA)
    blocked_s = max(states) / (ASSUMED_COPY_GB_S * GIGA) + (0.0 if is_asynchronous else write_s)
    cost_s = compute_saving_cost_s(
        blocked_s, write_s, is_asynchronous=is_asynchronous, is_on_cpu=pool.name == CPU_POOL_NAME
    )

    chosen = None
    if recipe.checkpoints.every_steps is None:
        chosen = compute_interval_steps(cost_s, write_s, plan.step_seconds)
    validation = recipe.validation.every_steps if recipe.validation.share else num_steps
    interval = min(chosen or recipe.checkpoints.every_steps or num_steps, validation, num_steps)
    return SavingEstimate(
        interval_steps=interval,
        chosen_steps=chosen,
        blocked_seconds=blocked_s,
        write_seconds=write_s,
        cost_seconds=cost_s,
        num_saves=1 + math.ceil(num_steps / interval),
    )


def estimate_transfer(
    recipe: Recipe, model: ModelConfig, pool: Pool, plan: PipelinePlan, num_steps: int, saving: SavingEstimate
) -> TransferEstimate:
    """Estimate the uploads of a run: of the first checkpoint on disk after the interval."""
    size, rate = STATE_BYTES * model.num_parameters, pool.store_gb_s or ASSUMED_STORE_GB_S
    upload_s = size / (rate * GIGA)
    chosen_steps = (upload_s + compute_upload_pause_s(upload_s)) / plan.step_seconds
    shortest_steps = recipe.checkpoints.store_every_steps or chosen_steps
    num_intervals = max(1, math.ceil(shortest_steps / saving.interval_steps - 1e-9))
    interval_steps = min(num_intervals * saving.interval_steps, num_steps)
    return TransferEstimate(
        interval_steps=interval_steps,
        seconds=upload_s,
        bytes_per_hour=size * 3600 / max(interval_steps * plan.step_seconds, upload_s),
        link_gb_s=rate,
        is_link_assumed=pool.store_gb_s is None,
    )


def estimate_restart(
    model: ModelConfig,
    pool: Pool,
    plan: PipelinePlan,
    nodes: Sequence[NodeEstimate],
    saving: SavingEstimate,
    transfer: TransferEstimate,
) -> RestartEstimate:
    """Estimate a restart: all ranks verify the files together, then each reads its states and its stage's weights."""
    rate = (pool.disk_gb_s or ASSUMED_DISK_GB_S) * GIGA
    size = STATE_BYTES * model.num_parameters
    verify_s = max(size / len(nodes) / rate, size / plan.num_ranks / (HASH_GB_S * GIGA))
    read = max(
        sum(
            count_rank_state_bytes(plan, model, n - 1) + MASTER_BYTES * count_stage_parameters(plan, model, n - 1)
            for n in node.stages
        )
        for node in nodes
    )
    return RestartEstimate(
        interval_steps=saving.interval_steps,
        start_seconds=RESTART_ESTIMATE_S,
        read_seconds=verify_s + read / rate,
        lost_seconds=saving.interval_steps / 2 * plan.step_seconds,
        lost_disk_seconds=transfer.interval_steps / 2 * plan.step_seconds,
        disk_gb_s=rate / GIGA,
        is_disk_assumed=pool.disk_gb_s is None,
    )


def count_kept_checkpoints() -> int:
    """Return the checkpoints on disk at a time: the newest ones, one in writing, and the one with the lowest loss."""
    return KEEP_CHECKPOINTS + 2


def count_stored_checkpoints(num_steps: int, interval_steps: int, *, exports_best: bool) -> int:
    """Return the most checkpoints of a run in the object store at a time.

    Those are the newest ones, the best one that the run still has on disk, and what an upload adds before it deletes
    older ones: the newest and, if the run exports its best, that one. A short run uploads fewer: one set an interval,
    the first one at once, and at the end the exported checkpoint.

    >>> count_stored_checkpoints(1000, 10, exports_best=False), count_stored_checkpoints(1000, 10, exports_best=True)
    (4, 5)
    >>> count_stored_checkpoints(100, 100, exports_best=False), count_stored_checkpoints(100, 100, exports_best=True)
    (2, 3)
    """
    uploads_at_once = 1 + exports_best
    num_uploads = uploads_at_once * math.ceil(num_steps / interval_steps) + 1
    return min(num_uploads, NUM_STORED_CHECKPOINTS + 1 + uploads_at_once)


def estimate_checkpoint_bytes(model: ModelConfig) -> int:
    """Return the bytes of the checkpoints on disk at a time."""
    return count_kept_checkpoints() * STATE_BYTES * model.num_parameters
