"""The devices of evaluations: a lease of the pool on which they run, and the job that runs under it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from feedback import leases
from flows.context import Context
from flows.round.evaluation_process import EVAL_LOG_FILE, EvaluationFailed
from flows.supervisor.lease_holder import GrantedLease, hold_lease, make_job_name
from flows.supervisor.pool_launcher import load_configured_pool, make_launcher
from flows.supervisor.reaper import reap_dead_leases
from infra.confinement import build_confined_environment
from infra.keeper import STACK_ID_VARIABLE
from infra.launchers.job import Job, JobExit, RunningJob
from infra.telemetry import NO_TELEMETRY_VARIABLES
from yuan.plan.pool import CPU_POOL_NAME, Pool

WEIGHT_MEMORY_FACTOR = 1.15  # memory of the process over the bytes of the weights, without the decoding cache
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
            EvaluationFailed: if no device of the pool holds the weights.
            NoCapacity: if the pool has no working device for it.
            LeaseLost: if the lease was taken away while it waited.
            LauncherUnreachable: if the batch system does not answer.
        """
        settings = self.context.settings
        pool = load_configured_pool(settings)
        launcher = make_launcher(pool)
        devices = choose_evaluation_devices(pool)
        devices.check_holds(measure_folder_bytes(model))
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
        memory_gib: memory of one of them.
    """

    device_class: str
    count: int
    memory_gib: float

    def check_holds(self, weight_bytes: int) -> None:
        """Check that one device holds weights.

        Raises:
            EvaluationFailed: if it does not.
        """
        needed_gib = WEIGHT_MEMORY_FACTOR * weight_bytes / 2**30
        if self.count == 1 and needed_gib > self.memory_gib:
            raise EvaluationFailed(
                f"the weights need {needed_gib:.1f} GiB on one device, and the largest of the pool, of class "
                f"{self.device_class}, has {self.memory_gib:.1f}; set COTRAIN_POOL to one with larger devices"
            )


def choose_evaluation_devices(pool: Pool) -> EvaluationDevices:
    """Return the devices of evaluations: one of the class with most memory, so that results stay comparable.

    On the default pool, whose devices are this machine's processors, they are all of them.
    """
    largest = max(pool.groups, key=lambda group: group.memory_gib - group.reserve_gib)
    count = largest.count if pool.name == CPU_POOL_NAME else 1
    return EvaluationDevices(largest.device_class, count, largest.memory_gib - largest.reserve_gib)


def measure_folder_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def build_evaluation_environment(context: Context, folder: Path, pool: Pool, lease: GrantedLease) -> dict[str, str]:
    """Build the environment of an evaluation, which has no account, and sees the leased devices of this machine."""
    environment = build_confined_environment(
        folder, **NO_TELEMETRY_VARIABLES, **{STACK_ID_VARIABLE: context.settings.stack_id}
    )
    if pool.launcher == "local":  # batch systems choose the devices of a node themselves
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(device.rpartition("/")[2] for device in lease.devices)
    return environment
