"""Plan a run again: for the devices that work, or with less memory after it ran out."""

import contextlib
import time
from collections import Counter
from dataclasses import replace

from feedback import leases, rounds
from flows.champion_model import find_champion_model
from flows.context import Context
from flows.supervisor.exit_reason import TrainingFailed
from flows.supervisor.pool_launcher import make_plan_limits
from flows.supervisor.run_reporter import RunReporter
from infra.faults import DATABASE_ERRORS
from yuan.plan.generation_stages import (
    GenerationModel,
    get_training_pool,
    has_serving_room,
    list_planning_pools,
    list_served_models,
)
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import draw_plan
from yuan.plan.pool import Pool
from yuan.plan.replan import replan, resize_pool
from yuan.plan.workload import Workload
from yuan.safe_files import replace_file_below
from yuan.train.events import ReplanEvent
from yuan.train.run_folder import PLAN_PICTURE_FILE, RunFolder

MAX_OOM_REPLANS = 3  # in a process
OOM_MEMORY_FACTOR = 0.85  # by which the memory that a plan may use is multiplied, at each of them
MAX_EVENT_REASON_CHARACTERS = 500  # of the field `why` of an event


class RunPlanner:
    """Replace a run's plan, in its folder and in the round's record, and count how often memory was reduced."""

    def __init__(self, context: Context, round_id: str, folder: RunFolder, reporter: RunReporter) -> None:
        self._context = context
        self._round_id = round_id
        self._folder = folder
        self._reporter = reporter
        self._num_oom_replans = 0

    def ensure_plan_fits(self, pool: Pool) -> PipelinePlan:
        """Return the run's plan, or a new one if its devices are no longer available; validate before leasing devices.

        Raises:
            ValueError: if the folder's inputs were changed.
            TrainingFailed: if no plan fits the remaining devices.
        """
        plan = self._folder.check_inputs().plan
        with self._context.sessions() as session:
            working_counts = leases.count_working_devices(session, pool.name)
        if Counter(plan.device_counts) <= working_counts:
            return plan
        return self._replan(pool, f"the plan needs {plan.device_counts}, and {dict(working_counts)} are available")

    def replan_after_oom(self, pool: Pool, message: str) -> None:
        """Plan again with less memory after the ranks ran out of memory (OOM).

        Raises:
            TrainingFailed: after MAX_OOM_REPLANS plans, or if no plan fits.
        """
        self._num_oom_replans += 1
        if self._num_oom_replans > MAX_OOM_REPLANS:
            memory_share = OOM_MEMORY_FACTOR**MAX_OOM_REPLANS
            raise TrainingFailed(
                f"out of memory with a plan for {memory_share:.0%} of the memory: {message}; "
                "start another round on a pool with more devices or more memory per device"
            )
        memory_share = OOM_MEMORY_FACTOR**self._num_oom_replans
        self._replan(pool, f"{message}; planning with {memory_share:.0%} of the memory")

    def get_working_pool(self, pool: Pool) -> Pool:
        """Return the pool reduced to its working devices for training and to the memory that plans may use after OOM.

        Raises:
            TrainingFailed: if no device works.
        """
        pool = get_training_pool(pool)
        with self._context.sessions() as session:
            working_counts = leases.count_working_devices(session, pool.name)
        if not working_counts:
            raise TrainingFailed(
                f"pool {pool.name!r} has lost all its devices; return some to it with `cotrain pool return`"
            )
        changes = {group.device_class: working_counts[group.device_class] - group.count for group in pool.groups}
        working_pool = resize_pool(pool, changes)

        memory_share = OOM_MEMORY_FACTOR**self._num_oom_replans
        groups = tuple(replace(group, memory_gib=group.memory_gib * memory_share) for group in working_pool.groups)
        return replace(working_pool, groups=groups)

    def leaves_serving_room(self, pool: Pool, plan: PipelinePlan) -> bool:
        """Return True if a plan leaves room for the model server on its devices.

        After the ranks have run out of memory it does not: their real need is not known.
        """
        return not self._num_oom_replans and has_serving_room(plan, pool, self._list_served_models())

    def _list_served_models(self) -> list[GenerationModel]:
        spec = self._folder.read_spec()
        with self._context.sessions() as session:
            champion = find_champion_model(session, self._context.versions)
        return list_served_models(spec.model, spec.plan.precision, champion)

    def _replan(self, pool: Pool, reason: str) -> PipelinePlan:
        """Plan for the working devices and the reduced memory, and write the plan to the run folder."""
        spec = self._folder.read_spec()
        working_pool = self.get_working_pool(pool)
        work = Workload.from_train_config(spec.model, spec.train_config)
        limits = make_plan_limits(working_pool, spec.fixed_micro_batch_size)
        for planning_pool in list_planning_pools(working_pool, self._list_served_models()):
            move = replan(work, spec.plan, planning_pool, limits)
            if move.plan.feasible:
                break
        plan = move.plan
        if not plan.feasible:
            raise TrainingFailed(f"{reason}; {plan.explanation}")

        self._folder.write_spec(spec.with_plan(plan))
        picture = draw_plan(work, working_pool, plan)
        replace_file_below(self._folder.path, PLAN_PICTURE_FILE, picture.encode())
        event = ReplanEvent(
            reason=reason[:MAX_EVENT_REASON_CHARACTERS],
            bounds=plan.bounds,
            data_size=plan.data_size,
            explanation=move.explanation,
            time=time.time(),
        )
        self._folder.append_event(event)

        # The folder's plan is the one that counts; an outage of the database must not end the run.
        with contextlib.suppress(*DATABASE_ERRORS), self._context.sessions.begin() as session:
            rounds.replace_plan(session, self._round_id, plan)
        self._reporter.publish_new_plan()
        return plan
