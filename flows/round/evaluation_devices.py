"""The devices of evaluations: a lease of the pool on which they run, and the job that runs under it."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from feedback import leases
from flows.champion_model import find_champion_model
from flows.context import Context
from flows.round.evaluation_process import EVAL_LOG_FILE, EvaluationFailed
from flows.supervisor.lease_holder import GrantedLease, hold_lease
from flows.supervisor.pool_launcher import load_configured_pool, make_launcher
from flows.supervisor.reaper import reap_dead_leases
from infra.confinement import build_confined_environment
from infra.faults import DATABASE_ERRORS
from infra.files import open_regular
from infra.keeper import STACK_ID_VARIABLE
from infra.launchers.job import Job, JobExit, RunningJob, make_job_name
from infra.telemetry import NO_TELEMETRY_VARIABLES
from yuan.data.text import make_printable
from yuan.device_faults import (
    BUS_ORDER_VARIABLES,
    DEVICE_LOST_STATUS,
    OUT_OF_MEMORY_STATUS,
    VISIBLE_DEVICES_VARIABLE,
    describes_lost_device,
)
from yuan.eval.results import DEVICE_FAULT_FILE
from yuan.eval.spec import EvaluationSpec
from yuan.model.model_folder import measure_value_bytes, read_model_config
from yuan.plan.devices import is_known_accelerator
from yuan.plan.generation_stages import (
    GenerationDevices,
    GenerationModel,
    NoGenerationDevices,
    choose_generation_devices,
    get_training_pool,
    leave_serving_room,
)
from yuan.plan.pool import CPU_POOL_NAME, Pool

log = logging.getLogger(__name__)

EXIT_LEASE_LOST = 75  # EX_TEMPFAIL
MAX_DEVICE_FAULT_BYTES = 300

WaitingCallback = Callable[[int], None]


@dataclass
class LeasedRunner:
    """Run the process of an evaluation on devices of the configured pool.

    It shares them with the model server, if there is room, until the process has once run out of memory there.

    Attributes:
        subject: what is evaluated, in the list of the pool's devices.
        report_waiting: called while other leases come first, with their number; may raise to give up.
        ttl_s: time to live of the lease without heartbeats, in seconds.
        lacked_memory: a process has run out of memory beside the model server.
    """

    context: Context
    subject: str
    priority: int = 0
    report_waiting: WaitingCallback = lambda _: None
    ttl_s: float = leases.LEASE_HEARTBEAT_TIMEOUT_S
    lacked_memory: bool = field(init=False, default=False)

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
        with self.context.sessions.begin() as session:
            leases.register_pool(session, pool)
        with self.context.sessions() as session:
            champion = find_champion_model(session, self.context.versions)
        devices = choose_evaluation_devices(pool, model, champion)
        if self.lacked_memory:
            devices = replace(devices, max_cache_bytes=None)
        spec = EvaluationSpec.read(folder)
        spec.model_copy(
            update={"num_accelerators": devices.num_accelerators, "max_cache_bytes": devices.max_cache_bytes}
        ).write(folder)
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
                devices_per_process=devices.count,
                is_distributed=False,
                excluded_hosts=() if pool.launcher == "local" else self._find_lost_hosts(pool),
            )
            with launcher.run(job) as running_job:
                yield LeasedJob(
                    running_job,
                    lease,
                    find_device_loss=lambda: self._find_device_loss(pool, folder, lease),
                    explain_exit=lambda status: self.explain_exit(status, folder, lease, devices),
                )

    def explain_exit(
        self, status: int, folder: Path, lease: GrantedLease, devices: "EvaluationDevices"
    ) -> JobExit | None:
        """Return the exit of a process that wrote what is wrong with its devices; None for any other."""
        fault = read_device_fault(folder)
        if status not in (DEVICE_LOST_STATUS, OUT_OF_MEMORY_STATUS) or fault is None:
            return None
        message = f"on {', '.join(lease.devices)}: {fault}"
        if status == OUT_OF_MEMORY_STATUS and devices.shares:
            self.lacked_memory = True
            return JobExit(status=status, cause="preempted", message=f"no memory beside the model server, {message}")
        return JobExit(status=status, message=message)

    def _find_device_loss(self, pool: Pool, folder: Path, lease: GrantedLease) -> str | None:
        """Return why the leased devices cannot be used any more; None if they can.

        A device that the process itself lost is taken out of use, if it had only this one and chose it.
        """
        with contextlib.suppress(*DATABASE_ERRORS), self.context.sessions.begin() as session:
            fault = read_device_fault(folder)
            is_single = len(lease.devices) == 1 and pool.launcher == "local"
            if fault is not None and describes_lost_device(fault) and is_single:
                leases.set_device_lost(session, pool.name, lease.devices[0], fault)
            lost = leases.find_lost_devices(session, pool.name, lease.devices)
            return "; ".join(f"{device}: {reason}" for device, reason in lost.items()) or None
        return None

    def _find_lost_hosts(self, pool: Pool) -> tuple[str, ...]:
        with self.context.sessions() as session:
            return tuple(leases.find_lost_hosts(session, pool.name))


@dataclass(frozen=True)
class LeasedJob:
    """A running job whose devices may be taken away or break.

    Attributes:
        find_device_loss: returns why its devices cannot be used any more; None if they can.
        explain_exit: returns the exit of a process that wrote what is wrong with its devices; None for any other.
    """

    job: RunningJob
    lease: GrantedLease
    find_device_loss: Callable[[], str | None]
    explain_exit: Callable[[int], JobExit | None]

    def wait(self, seconds: float) -> JobExit | None:
        """Wait for the job's end; a job whose lease is lost counts as ended, so that its block ends its processes."""
        job_exit = self.job.wait(seconds)
        if self.lease.lost.is_set():
            return JobExit(status=EXIT_LEASE_LOST, cause="preempted", message="the lease was revoked")
        if (job_exit is None or job_exit.status == DEVICE_LOST_STATUS) and (loss := self.find_device_loss()):
            log.warning("an evaluation lost its devices: %s", loss)
            return JobExit(status=DEVICE_LOST_STATUS, cause="node lost", message=loss)
        return (job_exit and self.explain_exit(job_exit.status)) or job_exit


def read_device_fault(folder: Path) -> str | None:
    """Return what the process of an evaluation wrote when it lost its device; None if it wrote nothing."""
    try:
        with os.fdopen(open_regular(folder / DEVICE_FAULT_FILE), "rb") as stream:
            text = stream.read(MAX_DEVICE_FAULT_BYTES).decode(errors="replace")
    except OSError:
        return None
    return make_printable(text, MAX_DEVICE_FAULT_BYTES) or None


@dataclass(frozen=True)
class EvaluationDevices:
    """The devices of an evaluation on a pool.

    Attributes:
        max_cache_bytes: of its decoding cache, so that the model server has room on the devices; None if it has none.
    """

    device_class: str
    count: int
    max_cache_bytes: int | None = None

    @property
    def shares(self) -> bool:
        """Return True if it leaves room for the model server."""
        return self.max_cache_bytes is not None

    @property
    def num_accelerators(self) -> int:
        """Return the number of devices that are certainly accelerators."""
        return self.count if is_known_accelerator(self.device_class) else 0


def choose_evaluation_class(pool: Pool) -> str:
    """Return the device class of evaluations: the one with most memory, so that results stay comparable."""
    groups = get_training_pool(pool).groups
    return max(groups, key=lambda group: group.memory_gib - group.reserve_gib).device_class


def choose_evaluation_devices(pool: Pool, folder: Path, champion: GenerationModel | None = None) -> EvaluationDevices:
    """Return the fewest devices that hold a model folder's weights; on the default pool, all processors.

    Args:
        champion: the model in service; the evaluated one may follow it.

    Raises:
        EvaluationFailed: if the devices of a node do not hold them, or the folder cannot be read.
    """
    device_class = choose_evaluation_class(pool)
    if pool.name == CPU_POOL_NAME:
        return EvaluationDevices(device_class, pool.num_devices)
    try:
        config = read_model_config(folder)
        model = GenerationModel(config, measure_value_bytes(folder, config))
        chosen = choose_generation_devices(
            get_training_pool(pool), config, device_class=device_class, value_bytes=model.value_bytes
        )
    except (OSError, ValueError) as error:
        raise EvaluationFailed(str(error)) from None
    served = [model] if champion is None else [model, champion]
    return EvaluationDevices(device_class, chosen.count, compute_shared_cache_bytes(pool, model, chosen, served))


def compute_shared_cache_bytes(
    pool: Pool, model: GenerationModel, chosen: GenerationDevices, served: Sequence[GenerationModel]
) -> int | None:
    """Return the cache of an evaluation beside the model server; None if it does not share its devices, or no room.

    Args:
        chosen: the devices of the evaluation alone.
        served: the models of which any may be served meanwhile.
    """
    if pool.serving not in ("auto", "share") or not pool.uses_devices_for_serving:
        return None
    try:
        beside = choose_generation_devices(
            leave_serving_room(pool, served),
            model.config,
            device_class=chosen.device_class,
            value_bytes=model.value_bytes,
        )
    except NoGenerationDevices:
        return None
    return beside.cache_bytes if beside.count == chosen.count else None


def build_evaluation_environment(context: Context, folder: Path, pool: Pool, lease: GrantedLease) -> dict[str, str]:
    """Build the environment of an evaluation, which has no account, and sees the leased devices of this machine."""
    environment = build_confined_environment(
        folder, **NO_TELEMETRY_VARIABLES, **{STACK_ID_VARIABLE: context.settings.stack_id}
    )
    if pool.launcher == "local":  # batch systems choose the devices of a node themselves
        numbers = pool.choose_visible_devices(lease.devices)
        environment |= {VISIBLE_DEVICES_VARIABLE: ",".join(map(str, numbers)), **BUS_ORDER_VARIABLES}
    return environment
