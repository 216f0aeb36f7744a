"""The supervisor of a run: devices, processes, and what is done when they end before the run does."""

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy.exc import OperationalError

from feedback import leases, rounds
from flows.context import Context
from flows.supervisor.checkpoint_sync import restore_checkpoint, upload_in_background
from flows.supervisor.exit_reason import RunEnding, classify, has_hung_rank, read_log_tail
from flows.supervisor.lease_holder import GrantedLease, hold_lease, make_job_name
from flows.supervisor.pool_launcher import load_configured_pool, make_launcher, make_plan_limits
from flows.supervisor.reaper import reap_dead_leases
from flows.supervisor.run_reporter import ProgressCallback, RunReporter
from infra.confinement import build_confined_environment
from infra.error_text import SafeMessageError
from infra.keeper import STACK_ID_VARIABLE
from infra.launchers.job import Job, LauncherUnreachable
from infra.machine import has_free_disk
from infra.settings import HOME_VARIABLE
from yuan.data.text import make_printable
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import draw_plan
from yuan.plan.pool import Pool
from yuan.plan.replan import replan, resize_pool
from yuan.plan.workload import Workload
from yuan.train.checkpoint_manifest import list_committed_checkpoints, parse_step
from yuan.train.run_files import replace_file
from yuan.train.run_folder import PLAN_PICTURE_FILE, RunFolder

log = logging.getLogger(__name__)

RUN_REPORT_EVERY_S = 2.0
MAX_RESTARTS_WITHOUT_PROGRESS = 5  # without a new checkpoint between them
MAX_MEMORY_SHRINKS, MEMORY_SHRINK_FACTOR = 3, 0.85  # of the memory a plan may use, when one that should fit did not
RUN_RESTART_PAUSE_S = 5.0


class TrainingFailed(SafeMessageError, RuntimeError):
    """The run cannot go on; the reason is for people."""


def train(context: Context, round_id: str, progress: ProgressCallback) -> None:
    """See a round's run through to its exported weights.

    Raises:
        RoundEnded: if the round was ended meanwhile; the processes are gone.
        TrainingFailed: if the run cannot go on.
        OSError: if the disk is full; the dispatcher starts the next attempt when there is room.
    """
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "train", context.attempt)
        run_id = rounds.get_or_create_training_run(session, round_id).id
        priority = int(rounds.find_round(session, round_id).parameters.get("priority", 0))
    folder = RunFolder(context.runs / run_id)
    reporter = RunReporter(context, round_id, folder, progress)
    with upload_in_background(context.objects, run_id, folder):
        Supervisor(context, round_id, run_id, folder, reporter, priority).run()
    reporter.report()
    reporter.finish()


class Supervisor:
    """One run under supervision: restarted, planned anew, or given up, until it has finished."""

    def __init__(
        self,
        context: Context,
        round_id: str,
        run_id: str,
        folder: RunFolder,
        reporter: RunReporter,
        priority: int = 0,
    ) -> None:
        self.context, self.round_id, self.run_id = context, round_id, run_id
        self.folder, self.reporter, self.priority = folder, reporter, priority
        self.pool = load_configured_pool(context.settings)
        self.launcher = make_launcher(self.pool)
        self.restarts = self.shrinks = 0
        self.last_checkpoint_step = 0

    def run(self) -> None:
        with self.context.sessions.begin() as session:
            leases.register_pool(session, self.pool)
        reap_dead_leases(
            self.context.sessions, {self.pool.name: self.launcher}
        )  # what the attempt before held, if it was killed
        brought = restore_checkpoint(self.context.objects, self.run_id, self.folder)
        if brought:
            log.info("brought %s of run %s back from the store", brought, self.run_id)
        while not self.folder.is_exported:
            ended = self._run_once()
            self.folder.append(
                "events.jsonl", {"event": "ended", "kind": ended.kind, "why": ended.reason[:500], "time": time.time()}
            )
            self._handle_ending(ended)

    def _run_once(self) -> RunEnding:
        """Take devices and run the processes once, from the last checkpoint to whatever end."""
        plan = self._ensure_plan_fits()
        settings = self.context.settings
        try:
            with hold_lease(
                self.context.sessions,
                self.pool.name,
                plan.device_counts,
                run_id=self.run_id,
                team=settings.team,
                priority=self.priority,
                waiting=lambda _: self.reporter.report(),
            ) as lease:
                return self._watch_run(plan, lease)
        except leases.NoCapacity as error:  # a device was lost while we waited
            return RunEnding(kind="lost device", reason=str(error))
        except leases.LeaseLost as error:
            return RunEnding(kind="preempted", reason=str(error))
        except LauncherUnreachable as error:
            time.sleep(RUN_RESTART_PAUSE_S)
            return RunEnding(kind="unknown", reason=str(error))

    def _watch_run(self, plan: PipelinePlan, lease: GrantedLease) -> RunEnding:
        placed = _assign_devices(plan, lease.devices)
        settings = self.context.settings
        environment = build_confined_environment(
            self.folder.path,
            OMP_NUM_THREADS="1",
            **{HOME_VARIABLE: str(settings.home), STACK_ID_VARIABLE: settings.stack_id},
            **{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},  # where nodes find the code
        )
        if self._is_local:  # batch systems choose the devices of a node themselves
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(device.rpartition("/")[2] for device in placed)
        job = Job(
            name=make_job_name(lease.id),
            module="yuan.train.run",
            folder=self.folder.path,
            num_processes=len(placed),
            processes_per_node=self._compute_processes_per_node(plan),
            environment=environment,
            avoid=() if self._is_local else self._find_bad_hosts(),
        )
        since = time.time()
        with self.launcher.run(job) as running:
            while True:
                ending = running.wait(RUN_REPORT_EVERY_S)
                if ending is not None:
                    break
                self.reporter.report()
                if self._is_local and has_hung_rank(self.folder, since):
                    # torchrun would wait half a minute for a rank that is stopped and cannot hear that it shall leave
                    self.launcher.end(job.name, RUN_REPORT_EVERY_S)
                    continue
                if lease.lost.is_set():
                    return RunEnding(kind="preempted", reason="the lease was taken away")
                if lost := self._find_lost_devices(lease):
                    return RunEnding(
                        kind="lost device", reason="; ".join(f"{name}: {why}" for name, why in lost.items())
                    )
        ended = classify(self.folder, ending, since)
        if ended.kind == "lost device" and ended.rank is not None:
            self._mark_device_lost(placed[ended.rank], ended)
        return ended

    @property
    def _is_local(self) -> bool:
        return self.pool.launcher == "local"

    def _find_bad_hosts(self) -> tuple[str, ...]:
        with self.context.sessions() as session:
            return tuple(leases.find_lost_hosts(session, self.pool.name))

    def _compute_processes_per_node(self, plan: PipelinePlan) -> int:
        """As many as fit on the smallest node of the plan's devices, the same on every node."""
        classes = {stage.device_class for stage in plan.stages}
        smallest = min(group.devices_per_node for group in self.pool.groups if group.device_class in classes)
        return next(n for n in range(min(plan.num_ranks, smallest), 0, -1) if plan.num_ranks % n == 0)

    def _find_lost_devices(self, lease: GrantedLease) -> dict[str, str]:
        """Devices of ours that were taken out of use meanwhile."""
        try:
            with self.context.sessions() as session:
                return leases.find_lost_devices(session, self.pool.name, lease.devices)
        except OperationalError:
            return {}

    def _mark_device_lost(self, device: str, ended: RunEnding) -> None:
        """Here the device; of a batch system a whole node, and the machine it was in, to be avoided."""
        host = None if self._is_local else ended.host
        with self.context.sessions.begin() as session:
            leases.set_device_lost(session, self.pool.name, device, ended.reason[:300], host)

    def _handle_ending(self, ended: RunEnding) -> None:
        """Decide how to go on; returns to start the processes again.

        Raises:
            TrainingFailed: if starting again would change nothing.
        """
        log.warning("the processes of run %s ended, %s: %s", self.run_id, ended.kind, make_printable(ended.reason, 300))
        if ended.kind in ("bad data", "numerical", "cancelled"):
            raise TrainingFailed(f"{ended.kind}: {ended.reason}")
        if not has_free_disk(self.folder.path):
            raise OSError(f"the disk of {self.folder.path} is full; make room, and the run goes on from its checkpoint")
        if ended.kind == "out of memory":
            self.shrinks += 1
            if self.shrinks > MAX_MEMORY_SHRINKS:
                raise TrainingFailed(
                    f"out of memory with {MEMORY_SHRINK_FACTOR**MAX_MEMORY_SHRINKS:.0%} of it planned for: "
                    f"{ended.reason}"
                )
            self._replan(f"{ended.reason}; planning with {MEMORY_SHRINK_FACTOR**self.shrinks:.0%} of the memory")
        elif ended.kind == "preempted":
            self.reporter.report()  # leaves if the round is another attempt's by now
            time.sleep(RUN_RESTART_PAUSE_S)
        elif ended.kind != "finished":
            self._count_restart(ended)

    def _count_restart(self, ended: RunEnding) -> None:
        """Restarts that bring the run on are free; those that do not are counted."""
        reached = max(map(parse_step, list_committed_checkpoints(self.folder.checkpoints)), default=0)
        self.restarts = self.restarts + 1 if reached <= self.last_checkpoint_step else 0
        self.last_checkpoint_step = max(self.last_checkpoint_step, reached)
        if self.restarts > MAX_RESTARTS_WITHOUT_PROGRESS:
            raise TrainingFailed(
                f"started {self.restarts} times without getting beyond step {reached}: {ended.reason}; "
                f"{read_log_tail(self.folder)}"
            )

    def _ensure_plan_fits(self) -> PipelinePlan:
        """The run's plan, made anew if its devices are no longer there; everything is checked before devices are taken.

        Raises:
            ValueError: if the folder was changed, or nothing fits what is left of the pool.
        """
        plan = self.folder.check_inputs().plan
        with self.context.sessions() as session:
            working = leases.count_working_devices(session, self.pool.name)
        if Counter(plan.device_counts) <= working:
            return plan
        return self._replan(f"the plan wants {plan.device_counts} and {dict(working)} work")

    def _replan(self, why: str) -> PipelinePlan:
        """Plan for the devices that work and the memory that is left, and put the plan into the run folder."""
        spec = self.folder.read_spec()
        pool = self._get_working_pool()
        work = Workload.from_recipe(spec.model, spec.recipe)
        moved = replan(work, spec.plan, pool, make_plan_limits(pool, spec.recipe))
        if not moved.plan.feasible:
            raise TrainingFailed(f"{why}; {moved.plan.explanation}")
        plan = moved.plan
        self.folder.write_spec(replace(spec, plan=plan))
        replace_file(self.folder.path, PLAN_PICTURE_FILE, draw_plan(work, pool, plan).encode())
        event = {"event": "re-plan", "why": why[:500], "bounds": plan.bounds, "data_size": plan.data_size}
        self.folder.append("events.jsonl", {**event, "explanation": moved.explanation, "time": time.time()})
        with contextlib.suppress(OperationalError), self.context.sessions.begin() as session:
            rounds.replace_plan(session, self.round_id, plan.to_json())
        self.reporter.publish_new_plan()
        return plan

    def _get_working_pool(self) -> Pool:
        """The pool's devices that work, with as much memory as plans may still use.

        Raises:
            TrainingFailed: if none works.
        """
        with self.context.sessions() as session:
            working = leases.count_working_devices(session, self.pool.name)
        if not working:
            raise TrainingFailed(f"pool {self.pool.name!r} has lost all its devices; return some to it")
        left = resize_pool(self.pool, {g.device_class: working[g.device_class] - g.count for g in self.pool.groups})
        share = MEMORY_SHRINK_FACTOR**self.shrinks
        return replace(left, groups=tuple(replace(group, memory_gib=group.memory_gib * share) for group in left.groups))


def _assign_devices(plan: PipelinePlan, devices: Sequence[str]) -> list[str]:
    """The device of each rank, of its stage's class; ranks are numbered stage by stage."""
    left = sorted(devices)
    placed = []
    for stage in plan.stages:
        own = [device for device in left if device.rpartition("/")[0] == stage.device_class][: plan.data_size]
        left = [device for device in left if device not in own]
        placed += own
    return placed
