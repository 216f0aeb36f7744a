"""Supervise a run: lease devices, start the ranks, and restart, re-plan or fail when they exit early."""

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from feedback import leases, rounds
from feedback.round_steps import RoundStep
from flows.context import Context
from flows.supervisor.checkpoint_sync import CheckpointUploader, restore_checkpoint, upload_in_background
from flows.supervisor.exit_reason import (
    ExitPolicy,
    ExitReason,
    RunExit,
    TrainingFailed,
    classify_exit,
    has_hung_rank,
    read_log_tail,
)
from flows.supervisor.lease_holder import GrantedLease, hold_lease
from flows.supervisor.pool_launcher import load_configured_pool, make_launcher
from flows.supervisor.reaper import reap_dead_leases
from flows.supervisor.run_planner import MAX_EVENT_REASON_CHARACTERS, RunPlanner
from flows.supervisor.run_reporter import ProgressCallback, RunReporter
from infra.confinement import build_confined_environment
from infra.faults import DATABASE_ERRORS
from infra.keeper import STACK_ID_VARIABLE
from infra.launchers.job import Job, LauncherUnreachable, make_job_name
from infra.machine import has_free_disk
from infra.settings import HOME_VARIABLE
from yuan.data.text import make_printable
from yuan.device_faults import BUS_ORDER_VARIABLES, VISIBLE_DEVICES_VARIABLE
from yuan.plan.plan_record import PipelinePlan
from yuan.train.events import EndedEvent
from yuan.train.run_folder import TRAIN_LOG_FILE, RunFolder

log = logging.getLogger(__name__)

RUN_REPORT_EVERY_S = 2.0
MAX_RESTARTS_WITHOUT_PROGRESS = 5  # consecutive restarts without a new checkpoint
RUN_RESTART_PAUSE_S = 5.0
MAX_LOGGED_CHARACTERS = 300
MAX_DEVICE_REASON_CHARACTERS = 300  # of the reason that a device is out of use


def train_candidate(
    context: Context, round_id: str, progress: ProgressCallback, input_folders: tuple[Path, ...] = ()
) -> None:
    """Run a round's training until its weights are exported.

    Args:
        input_folders: folders outside the run's own that its ranks read.

    Raises:
        RoundOwnershipLost: if the round ended or a later attempt took over; the processes have exited.
        TrainingFailed: if the run cannot continue.
        OSError: if the disk is full; the dispatcher starts the next attempt when there is free space.
    """
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, RoundStep.TRAIN, context.attempt)
        run_id = rounds.get_or_create_training_run(session, round_id).id
        priority = rounds.read_parameters(rounds.find_round(session, round_id)).priority

    folder = RunFolder(context.runs / run_id)
    reporter = RunReporter(context, round_id, folder, progress)
    train_config = folder.read_spec().train_config
    exports_best = train_config.validate_every is not None
    uploader = CheckpointUploader(context.objects, run_id, folder, train_config.store_every, exports_best=exports_best)
    with upload_in_background(uploader):
        Supervisor(context, round_id, run_id, folder, reporter, priority, input_folders).run()
    shutil.rmtree(folder.parent_state, ignore_errors=True)  # as large as a checkpoint, and read at the first start only
    reporter.report()
    reporter.finish()


class Supervisor:
    """Supervise one run: restart or re-plan it until it has finished, or fail it."""

    def __init__(
        self,
        context: Context,
        round_id: str,
        run_id: str,
        folder: RunFolder,
        reporter: RunReporter,
        priority: int = 0,
        input_folders: tuple[Path, ...] = (),
    ) -> None:
        self.context = context
        self.run_id = run_id
        self.folder = folder
        self.reporter = reporter
        self.priority = priority
        self.input_folders = input_folders
        self.pool = load_configured_pool(context.settings)
        self.launcher = make_launcher(self.pool)
        self.planner = RunPlanner(context, round_id, folder, reporter)
        self.num_restarts = 0  # consecutive, without a new checkpoint
        self.last_checkpoint_step = 0

    def run(self) -> None:
        """Run the processes, as often as needed, until the weights are exported.

        Raises:
            RoundOwnershipLost: if the round ended or a later attempt took over; the processes have exited.
            TrainingFailed: if the run cannot continue.
            OSError: if the disk is full.
        """
        with self.context.sessions.begin() as session:
            leases.register_pool(session, self.pool)
        # The previous attempt may have been killed while it held a lease.
        reap_dead_leases(self.context.sessions, {self.pool.name: self.launcher})

        # The disk with the run's folder may be a new one.
        restored_name = restore_checkpoint(self.context.objects, self.run_id, self.folder)
        if restored_name is not None:
            log.info("restored checkpoint %s of run %s from the store", restored_name, self.run_id)

        while not self.folder.is_finished:
            run_exit = self._run_once()
            self.folder.append_event(
                EndedEvent(
                    exit_reason=run_exit.reason, reason=run_exit.message[:MAX_EVENT_REASON_CHARACTERS], time=time.time()
                )
            )
            self._handle_exit(run_exit)

    def _run_once(self) -> RunExit:
        """Lease devices and run the processes once, from the last checkpoint until they exit; return their exit."""
        plan = self.planner.ensure_plan_fits(self.pool)
        settings = self.context.settings
        try:
            with hold_lease(
                self.context.sessions,
                self.pool.name,
                plan.device_counts,
                run_id=self.run_id,
                team=settings.team,
                priority=self.priority,
                shares_devices=self.planner.leaves_serving_room(self.pool, plan),
                report_waiting=lambda _: self.reporter.report(),
            ) as lease:
                return self._watch_run(plan, lease)
        except leases.NoCapacity as error:  # a device was lost while waiting for the lease
            return RunExit(reason=ExitReason.LOST_DEVICE, message=str(error))
        except leases.LeaseLost as error:
            return RunExit(reason=ExitReason.PREEMPTED, message=str(error))
        except LauncherUnreachable as error:
            time.sleep(RUN_RESTART_PAUSE_S)
            return RunExit(reason=ExitReason.UNKNOWN, message=str(error))

    def _watch_run(self, plan: PipelinePlan, lease: GrantedLease) -> RunExit:
        """Start the plan's processes on the leased devices, and watch them until they exit or lose a device."""
        rank_devices = _assign_devices(plan, lease.devices)
        job = self._make_job(plan, lease, rank_devices)
        started_at = time.time()
        with self.launcher.run(job) as running_job:
            while (job_exit := running_job.wait(RUN_REPORT_EVERY_S)) is None:
                self.reporter.report()

                # torchrun would wait 30 s for a stopped rank, which cannot handle the signal to exit.
                if self._is_local and has_hung_rank(self.folder, started_at):
                    self.launcher.end(job.name, RUN_REPORT_EVERY_S)
                    continue

                # Leaving the block ends the processes, before others may use their devices.
                device_loss = self._find_device_loss(lease)
                if device_loss is not None:
                    return device_loss

        run_exit = classify_exit(self.folder, job_exit, started_at)
        # The rank's number comes from a note that a rank wrote, so it may be out of range.
        if (
            run_exit.policy == ExitPolicy.REPLACE_DEVICE
            and run_exit.rank is not None
            and run_exit.rank < len(rank_devices)
        ):
            self.mark_device_lost(rank_devices[run_exit.rank], run_exit)
        return run_exit

    def _make_job(self, plan: PipelinePlan, lease: GrantedLease, rank_devices: Sequence[str]) -> Job:
        settings = self.context.settings
        environment = build_confined_environment(
            self.folder.path,
            OMP_NUM_THREADS="1",
            **{HOME_VARIABLE: str(settings.home), STACK_ID_VARIABLE: settings.stack_id},
            **{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},  # import path on the nodes
        )
        if self._is_local:  # batch systems choose the devices of a node themselves
            numbers = self.pool.choose_visible_devices(rank_devices)
            environment |= {VISIBLE_DEVICES_VARIABLE: ",".join(map(str, numbers)), **BUS_ORDER_VARIABLES}
        return Job(
            name=make_job_name(lease.id),
            module="yuan.train.run",
            folder=self.folder.path,
            input_folders=self.input_folders,
            num_processes=len(rank_devices),
            processes_per_node=self._compute_processes_per_node(plan),
            environment=environment,
            log_name=TRAIN_LOG_FILE,
            excluded_hosts=() if self._is_local else self.find_lost_hosts(),
        )

    def _find_device_loss(self, lease: GrantedLease) -> RunExit | None:
        """Return the exit of a run whose processes must not continue on its devices; None if they may."""
        if lease.lost.is_set():
            return RunExit(reason=ExitReason.PREEMPTED, message="the lease was revoked")
        lost_devices = self._find_lost_devices(lease)
        if not lost_devices:
            return None
        message = "; ".join(f"{device}: {reason}" for device, reason in lost_devices.items())
        return RunExit(reason=ExitReason.LOST_DEVICE, message=message)

    @property
    def _is_local(self) -> bool:
        return self.pool.launcher == "local"

    def find_lost_hosts(self) -> tuple[str, ...]:
        """Return the hosts with a lost device, on which jobs of a batch system do not start."""
        with self.context.sessions() as session:
            return tuple(leases.find_lost_hosts(session, self.pool.name))

    def _compute_processes_per_node(self, plan: PipelinePlan) -> int:
        """Compute the largest divisor of the number of ranks that fits on the smallest node of the plan's devices."""
        classes = {stage.device_class for stage in plan.stages}
        smallest_node = min(group.devices_per_node for group in self.pool.groups if group.device_class in classes)
        return next(n for n in range(min(plan.num_ranks, smallest_node), 0, -1) if plan.num_ranks % n == 0)

    def _find_lost_devices(self, lease: GrantedLease) -> dict[str, str]:
        """Return the leased devices that were taken out of use since, with their reasons."""
        try:
            with self.context.sessions() as session:
                return leases.find_lost_devices(session, self.pool.name, lease.devices)
        except DATABASE_ERRORS:
            return {}

    def mark_device_lost(self, device: str, run_exit: RunExit) -> None:
        """Take the device out of use; in a batch system its whole node, and exclude its host from later jobs."""
        reason = run_exit.message[:MAX_DEVICE_REASON_CHARACTERS]
        host = None if self._is_local else run_exit.host
        with self.context.sessions.begin() as session:
            leases.set_device_lost(session, self.pool.name, device, reason, host)

    def _handle_exit(self, run_exit: RunExit) -> None:
        """Decide how to continue; return if the processes are to be restarted.

        Raises:
            TrainingFailed: if a restart would not help.
            OSError: if the disk is full.
        """
        shown_message = make_printable(run_exit.message, MAX_LOGGED_CHARACTERS)
        log.warning("the processes of run %s ended, %s: %s", self.run_id, run_exit.reason, shown_message)
        if run_exit.policy == ExitPolicy.STOP:
            raise TrainingFailed(f"{run_exit.reason}: {run_exit.message}")
        if not has_free_disk(self.folder.path):
            raise OSError(
                f"the disk of {self.folder.path} is full; free space, and the run resumes from its checkpoint"
            )

        match run_exit.policy:
            case ExitPolicy.REPLAN:
                self.planner.replan_after_oom(self.pool, run_exit.message)
            case ExitPolicy.WAIT:
                self.reporter.report()  # raises if a later attempt has taken over the round
                time.sleep(RUN_RESTART_PAUSE_S)
            case ExitPolicy.RESTART | ExitPolicy.REPLACE_DEVICE:
                self._count_restart(run_exit)

    def _count_restart(self, run_exit: RunExit) -> None:
        """Count consecutive restarts without a new checkpoint; a new checkpoint resets the count."""
        newest_step = self.folder.newest_step()
        has_progressed = newest_step > self.last_checkpoint_step
        self.num_restarts = 0 if has_progressed else self.num_restarts + 1
        self.last_checkpoint_step = max(self.last_checkpoint_step, newest_step)
        if self.num_restarts > MAX_RESTARTS_WITHOUT_PROGRESS:
            raise TrainingFailed(
                f"started {self.num_restarts} times without getting beyond step {newest_step}: {run_exit.message}; "
                f"remove the cause and start another round; the log ends with: {read_log_tail(self.folder)}"
            )


def _assign_devices(plan: PipelinePlan, devices: Sequence[str]) -> list[str]:
    """Return the device of each rank, of its stage's device class; ranks are numbered stage by stage."""
    free = sorted(devices)
    rank_devices = []
    for stage in plan.stages:
        matching = [device for device in free if device.rpartition("/")[0] == stage.device_class]
        stage_devices = matching[: plan.data_size]
        free = [device for device in free if device not in stage_devices]
        rank_devices += stage_devices
    return rank_devices
