"""The devices of evaluations: a lease of the pool on which they run, and the job that runs under it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from feedback import leases
from flows.context import Context
from flows.round.evaluation_process import EVAL_LOG_FILE, EvaluationFailed
from flows.supervisor.lease_holder import GrantedLease, hold_lease
from flows.supervisor.pool_launcher import load_configured_pool, make_launcher
from flows.supervisor.reaper import reap_dead_leases
from infra.confinement import build_confined_environment
from infra.keeper import STACK_ID_VARIABLE
from infra.launchers.job import Job, JobExit, RunningJob, make_job_name
from infra.telemetry import NO_TELEMETRY_VARIABLES
from yuan.config import ModelConfig
from yuan.model.model_folder import measure_value_bytes, read_model_config
from yuan.plan.generation_stages import (
    GenerationDevices,
    NoGenerationDevices,
    choose_generation_devices,
    get_training_pool,
    leave_serving_room,
)
from yuan.plan.memory_model import GIB
from yuan.plan.pool import CPU_POOL_NAME, Pool

EXIT_LEASE_LOST = 75  # EX_TEMPFAIL

WaitingCallback = Callable[[int], None]


@dataclass(frozen=True)
class LeasedRunner:
    """Run the process of an evaluation on devices of the configured pool.

    Attributes:
        subject: what is evaluated, in the list of the pool's devices.
        report_waiting: called while other leases come first, with their number; may raise to give up.
        ttl_s: time to live of the lease without heartbeats, in seconds.
    """

    context: Context
    subject: str
    priority: int = 0
    report_waiting: WaitingCallback = lambda _: None
    ttl_s: float = leases.LEASE_HEARTBEAT_TIMEOUT_S

    @contextlib.contextmanager
    def run(self, folder: Path, model: Path) -> Iterator[RunningJob]:
        """Wait for a lease, and run the process under it.

        Raises:
            EvaluationFailed: if the devices of a node do not hold the weights.
            NoCapacity: if the pool has no working device for it.
            LeaseLost: if the lease was taken away while it waited.
            LauncherUnreachable: if the batch system does not answer.
        """
        settings = self.context.settings
        pool = load_configured_pool(settings)
        launcher = make_launcher(pool)
        devices = choose_evaluation_devices(pool, model)
        with self.context.sessions.begin() as session:
            leases.register_pool(session, pool)
        # An earlier evaluation may have been killed while it held a lease.
        reap_dead_leases(self.context.sessions, {pool.name: launcher})
        with hold_lease(
            self.context.sessions,
            pool.name,
            {devices.device_class: devices.count},
            run_id=self.subject,
            team=settings.team,
            priority=self.priority,
            shares_devices=devices.shares,
            ttl_s=self.ttl_s,
            report_waiting=self.report_waiting,
        ) as lease:
            job = Job(
                name=make_job_name(lease.id),
                module="yuan.eval.run",
                folder=folder,
                input_folders=(model,),
                num_processes=1,
                processes_per_node=1,
                environment=build_evaluation_environment(self.context, folder, pool, lease),
                log_name=EVAL_LOG_FILE,
                is_distributed=False,
                excluded_hosts=() if pool.launcher == "local" else self._find_lost_hosts(pool),
            )
            with launcher.run(job) as running_job:
                yield LeasedJob(running_job, lease)

    def _find_lost_hosts(self, pool: Pool) -> tuple[str, ...]:
        with self.context.sessions() as session:
            return tuple(leases.find_lost_hosts(session, pool.name))


@dataclass(frozen=True)
class LeasedJob:
    """A running job whose devices may be taken away."""

    job: RunningJob
    lease: GrantedLease

    def wait(self, seconds: float) -> JobExit | None:
        """Wait for the job's end; a job whose lease is lost counts as ended, so that its block ends its processes."""
        job_exit = self.job.wait(seconds)
        if self.lease.lost.is_set():
            return JobExit(status=EXIT_LEASE_LOST, cause="preempted", message="the lease was revoked")
        return job_exit


@dataclass(frozen=True)
class EvaluationDevices:
    """The devices of an evaluation on a pool.

    Attributes:
        shares: it leaves room for the model server on them.
    """

    device_class: str
    count: int
    shares: bool = False


def choose_evaluation_class(pool: Pool) -> str:
    """Return the device class of evaluations: the one with most memory, so that results stay comparable."""
    groups = get_training_pool(pool).groups
    return max(groups, key=lambda group: group.memory_gib - group.reserve_gib).device_class


def choose_evaluation_devices(pool: Pool, folder: Path) -> EvaluationDevices:
    """Return the fewest devices that hold a model folder's weights; on the default pool, all processors.

    Raises:
        EvaluationFailed: if the devices of a node do not hold them, or the folder cannot be read.
    """
    device_class = choose_evaluation_class(pool)
    if pool.name == CPU_POOL_NAME:
        return EvaluationDevices(device_class, pool.num_devices)
    try:
        config = read_model_config(folder)
        value_bytes = measure_value_bytes(folder, config)
        training_pool = get_training_pool(pool)
        chosen = choose_generation_devices(training_pool, config, device_class=device_class, value_bytes=value_bytes)
    except (OSError, ValueError) as error:
        raise EvaluationFailed(str(error)) from None
    return EvaluationDevices(device_class, chosen.count, has_room_beside_serving(pool, config, chosen, value_bytes))


def has_room_beside_serving(pool: Pool, config: ModelConfig, chosen: GenerationDevices, value_bytes: int) -> bool:
    """Return True if the model server shares devices, and its model and cache fit beside those of an evaluation."""
    if pool.serving not in ("auto", "share") or not pool.uses_devices_for_serving:
        return False
    try:
        shared_pool = leave_serving_room(pool, config)
        beside = choose_generation_devices(
            shared_pool, config, device_class=chosen.device_class, value_bytes=value_bytes
        )
    except NoGenerationDevices:
        return False
    # The process takes a share of the memory that is free at its start, when the server's cache may still be empty.
    return beside.count == chosen.count and beside.cache_bytes >= pool.serving_gib * GIB


def build_evaluation_environment(context: Context, folder: Path, pool: Pool, lease: GrantedLease) -> dict[str, str]:
    """Build the environment of an evaluation, which has no account, and sees the leased devices of this machine."""
    environment = build_confined_environment(
        folder, **NO_TELEMETRY_VARIABLES, **{STACK_ID_VARIABLE: context.settings.stack_id}
    )
    if pool.launcher == "local":  # batch systems choose the devices of a node themselves
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(device.rpartition("/")[2] for device in lease.devices)
    return environment
