"""Give devices of the pool to the model server, and take them back when training or evaluation waits for them.

The model server has no access to the database. So the dispatcher requests its lease, sends the lease's heartbeats while
the server answers, and tells it which devices it has. A server that is told nothing for GRANT_TTL_S gives them back.
"""

import logging
import time
from datetime import datetime, timedelta, timezone

import httpx
from sqlalchemy.orm import Session

from feedback import leases, rounds, serving_leases
from feedback.leases import LeaseLost, NoCapacity
from feedback.promotion import find_champion
from feedback.tables import Lease
from flows.champion_model import find_champion_model
from flows.context import DispatcherContext
from flows.duties import compute_age_s
from flows.supervisor.pool_launcher import load_configured_pool
from infra.processes import is_known_alive
from yuan.device_faults import describes_lost_device
from yuan.plan.devices import is_known_accelerator
from yuan.plan.generation_stages import (
    GENERATION_WORKSPACE_FACTOR,
    GenerationDevices,
    GenerationModel,
    NoGenerationDevices,
    choose_generation_devices,
)
from yuan.plan.memory_model import GIB
from yuan.plan.pool import Pool
from yuan.serve.grants import LENT_RETRY_AFTER_S, DeviceGrant, GrantState
from yuan.train.run_status import RunStatus
from yuan.version_names import NO_VERSION_MESSAGE

log = logging.getLogger(__name__)

GRANT_TTL_S = 180.0  # below the time after which a lease without heartbeats is taken away from a live holder
DEVICE_CALL_TIMEOUT_S = 5.0
RETAKE_AFTER_S = 20.0  # from a lease's end, since a round's evaluation asks for devices right after its training
MAX_RETRY_AFTER_S = 3600
MAX_SERVING_LOSS_CHARACTERS = 300
RESTART_TIMEOUT_S = 180.0  # running requests end, and the next process image loads the model


class ServingProblem(RuntimeError):
    """The champion cannot be served on the pool's devices until an operator changes something."""


class ServingDevices:
    """Follow the pool's setting for serving; `advance` is called every few seconds.

    Attributes:
        is_lent: the model server has no model at present because its devices are used by others.
    """

    def __init__(self, context: DispatcherContext) -> None:
        self._context = context
        self._registered: Pool | None = None
        self.is_lent = False
        self._restart_ends_at = 0.0  # of the monotonic clock
        self._problem: str | None = None

    def advance(self) -> None:
        """Compare the lease with what the server has, and do the next step.

        Raises:
            httpx.HTTPError: if the model server does not answer; its lease gets no heartbeat then.
            ServingProblem: if the champion cannot be served; callers are told so.
            ValueError: if the pool is not valid.
        """
        try:
            pool = load_configured_pool(self._context.settings)
        except ValueError:
            if self._registered is not None:  # the server keeps what it has by the last valid file
                self._follow(self._registered)
            raise
        self._follow(pool)

    def _follow(self, pool: Pool) -> None:
        try:
            self._follow_pool(pool, self._call("GET", None))
        except httpx.HTTPError as error:
            if not pool.uses_devices_for_serving:  # its server has no devices, and its faults are the keeper's matter
                self.is_lent = False
                return
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.NOT_FOUND:
                raise ServingProblem(
                    "the pool gives devices to the model server, which was started without them; run `cotrain down` "
                    "and `cotrain up`"
                ) from None
            if not isinstance(error, httpx.TransportError) or time.monotonic() > self._restart_ends_at:
                raise

    def _follow_pool(self, pool: Pool, state: GrantState) -> None:
        self._problem = state.problem
        if pool != self._registered:
            with self._context.sessions.begin() as session:
                leases.register_pool(session, pool)
            self._registered = pool
        with self._context.sessions.begin() as session:
            lease = serving_leases.find_serving_lease(session)
            if lease is None:
                grant = self._try_to_take(session, pool, state)
            else:
                grant = self._keep_or_release(session, pool, lease, state)
        new_state = self._call("PUT", grant)
        self.is_lent = grant.lease_id is None
        if grant.lease_id != state.lease_id:  # it executes itself again, and answers when torch is imported
            self._restart_ends_at = time.monotonic() + RESTART_TIMEOUT_S
        # Any other holder may still use the devices: the reaper ends what runs under the lease of a silent one.
        is_own = lease is not None and lease.holder == new_state.identity
        if lease is not None and is_own and grant.lease_id is None and new_state.state == "waiting":
            self._release(lease)
        if self._problem is not None:
            raise ServingProblem(self._problem)

    def _call(self, method: str, grant: DeviceGrant | None) -> GrantState:
        """Call the model server, on a new connection, since the process at the other end is replaced now and then."""
        settings = self._context.settings
        response = httpx.request(
            method,
            f"{settings.model_server_url}/devices",
            json=None if grant is None else grant.model_dump(),
            headers={"Authorization": f"Bearer {settings.model_server_token.get_secret_value()}"},
            timeout=DEVICE_CALL_TIMEOUT_S,
        )
        return GrantState.model_validate(response.raise_for_status().json())

    def _try_to_take(self, session: Session, pool: Pool, state: GrantState) -> DeviceGrant:
        """Return the grant of a new lease, or one without devices that says why there is none."""
        if state.state != "waiting":  # of a lease that was taken away
            return DeviceGrant(message="the model server gives back a device; retry in a minute")
        if not pool.uses_devices_for_serving:
            self._problem = (
                "the pool gives no devices to the model server, which was started for them; run `cotrain down` and "
                "`cotrain up`, and it computes on its machine's processors"
            )
            return DeviceGrant(message="the model server must be started again; tell the operator")
        try:
            devices = self._choose_devices(session, pool)
        except NoGenerationDevices as error:
            self._problem = str(error)
            return DeviceGrant(message="the champion cannot be served on its devices; tell the operator")
        if devices is None and find_champion(session) is None:
            return DeviceGrant(message=NO_VERSION_MESSAGE, retry_after_s=None)
        if devices is None:
            return DeviceGrant(message="the champion is being fetched; retry in a minute")
        if (other := serving_leases.find_holder_of_other_local_pool(session, pool.name)) is not None:
            return describe_lender(other, self._find_eta_s(session, other))
        # Between a round's training and its evaluation the devices are free for seconds only.
        last_release = serving_leases.find_last_release(session, pool.name)
        if last_release is not None and compute_age_s(last_release) < RETAKE_AFTER_S:
            return self._describe_loan(session, pool)
        try:
            lease = serving_leases.take_serving_lease(
                session,
                pool.name,
                {devices.device_class: devices.count},
                team=self._context.settings.team,
                holder=state.identity,
                shares_devices=pool.serving in ("auto", "share"),
            )
        except NoCapacity as error:
            self._problem = str(error)
            return DeviceGrant(message="no device for serving works at present; tell the operator")
        if lease is None:
            return self._describe_loan(session, pool)
        log.info("lease %s of the model server: %s", lease.id[:8], ", ".join(lease.devices or []))
        return make_grant(pool, lease, choose_cache_bytes(pool, devices))

    def _keep_or_release(self, session: Session, pool: Pool, lease: Lease, state: GrantState) -> DeviceGrant:
        """Return the grant of the server's lease, or one without devices if others need them."""
        if lease.fenced_at is not None:  # the reaper ends what runs under it
            return DeviceGrant(message="the model server's former processes end; retry in a minute")
        if lease.holder != state.identity:
            if not is_known_alive(lease.holder):  # the server was started again
                leases.release_lease(session, lease.id, lease.generation, "the model server exited")
            return DeviceGrant()
        try:
            leases.record_lease_heartbeat(session, lease.id, lease.generation)
        except LeaseLost:
            return DeviceGrant()
        if state.problem and describes_lost_device(state.problem) and lease.devices and len(lease.devices) == 1:
            leases.set_device_lost(session, lease.pool, lease.devices[0], state.problem[:MAX_SERVING_LOSS_CHARACTERS])
        if lost := leases.find_lost_devices(session, lease.pool, lease.devices or []):
            log.warning("the model server gives back lost devices: %s", lost)
            return DeviceGrant(message="the device of the model is lost, and another one is taken; retry in a minute")
        has_left = lease.pool != pool.name or not pool.uses_devices_for_serving  # the pool's file was changed
        if has_left or (pool.serving == "own" and not set(lease.devices or []) <= set(pool.serving_devices)):
            return DeviceGrant(message="the model leaves its device, which is not for it any more; retry in a minute")
        if (pool.serving in ("auto", "share")) != lease.shares_devices:
            return DeviceGrant()
        if waiting := serving_leases.find_leases_blocked_by(session, lease):
            if state.state == "serving":
                log.info("the model server yields to %s", waiting[0].run_id)
            return describe_lender(waiting[0].run_id, self._find_eta_s(session, waiting[0].run_id))
        try:
            devices = self._choose_devices(session, pool)
        except NoGenerationDevices as error:  # the former version stays in service
            self._problem, devices = str(error), None
        if devices is None:  # the budget stays
            has_budget = state.lease_id == lease.id and bool(state.cache_bytes)
            return make_grant(pool, lease, state.cache_bytes or 0) if has_budget else DeviceGrant()
        if {devices.device_class: devices.count} != lease.device_counts:
            log.info("the champion needs %d devices of class %s", devices.count, devices.device_class)
            return DeviceGrant(message="the model moves to other devices; retry in a minute")
        return make_grant(pool, lease, choose_cache_bytes(pool, devices))

    def _release(self, lease: Lease) -> None:
        """Release the lease that the server no longer uses, and grant its devices to the leases that wait."""
        with self._context.sessions.begin() as session:
            leases.release_lease(session, lease.id, lease.generation, "given back")
            leases.grant_leases(session, lease.pool)

    def _choose_devices(self, session: Session, pool: Pool) -> GenerationDevices | None:
        """Return the devices that hold the champion; None if there is no champion, or the cache lacks it yet.

        Raises:
            NoGenerationDevices: if no devices hold it, or its folder cannot be read.
        """
        try:
            model = find_champion_model(session, self._context.versions)
        except (OSError, ValueError) as error:
            raise NoGenerationDevices(f"the champion's model folder cannot be read: {error}") from None
        return None if model is None else choose_serving_devices(pool, model)

    def _describe_loan(self, session: Session, pool: Pool) -> DeviceGrant:
        """Return a grant without devices that says who has them, and until when."""
        run_id = serving_leases.find_newest_holder(session, pool.name)
        if run_id is None:
            return DeviceGrant(message="the model is being loaded; retry in a minute")
        return describe_lender(run_id, self._find_eta_s(session, run_id))

    def _find_eta_s(self, session: Session, run_id: str) -> float | None:
        """Return the remaining seconds of a training run; None if they are not known."""
        try:
            return RunStatus.from_json(rounds.find_run_status(session, run_id) or {}).eta_s
        except ValueError:
            return None


def choose_serving_devices(pool: Pool, model: GenerationModel) -> GenerationDevices:
    """Choose the devices of the model server: the pool's own ones, or the fewest that hold the model.

    Raises:
        NoGenerationDevices: if they do not hold it.
    """
    if pool.serving != "own":
        return choose_generation_devices(pool, model.config, value_bytes=model.value_bytes)
    device_class = pool.serving_devices[0].rpartition("/")[0]
    chosen = choose_generation_devices(pool, model.config, device_class=device_class, value_bytes=model.value_bytes)
    if chosen.count > len(pool.serving_devices):
        raise NoGenerationDevices(
            f"the champion needs {chosen.count} devices of class {device_class}, and serving has "
            f"{len(pool.serving_devices)} of its own; name more in serving_devices"
        )
    return chosen


def choose_cache_bytes(pool: Pool, devices: GenerationDevices) -> int:
    """Return the budget of the decoding cache: `serving_gib` on shared devices, else what the weights leave.

    Where at least half of that remains, there is room for the weights of the next champion too.
    """
    if pool.serving in ("auto", "share"):
        return min(int(pool.serving_gib * GIB), devices.cache_bytes)
    beside_bytes = devices.cache_bytes - int(GENERATION_WORKSPACE_FACTOR * devices.weight_bytes)
    return beside_bytes if 2 * beside_bytes >= devices.cache_bytes else devices.cache_bytes


def make_grant(pool: Pool, lease: Lease, cache_bytes: int) -> DeviceGrant:
    """Return the grant of a lease's devices."""
    devices = lease.devices or []
    return DeviceGrant(
        lease_id=lease.id,
        devices=pool.choose_visible_devices(devices),
        are_accelerators=all(is_known_accelerator(device.rpartition("/")[0]) for device in devices),
        cache_bytes=cache_bytes,
        ttl_s=GRANT_TTL_S,
    )


def describe_lender(run_id: str, eta_s: float | None) -> DeviceGrant:
    """Return a grant without devices, whose message says what has them, and until when.

    >>> describe_lender("evaluation of v3", None).message
    "the model's device is lent to the evaluation of v3; retry in a minute"
    """
    borrower = f"the {run_id}" if " of v" in run_id else "training"  # as evaluations and smoke tests are named
    if eta_s is None:
        return DeviceGrant(message=f"the model's device is lent to {borrower}; retry in a minute")
    until = datetime.now(timezone.utc) + timedelta(seconds=eta_s)
    retry_after_s = min(max(int(eta_s), LENT_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
    return DeviceGrant(
        message=f"the model's device is lent to {borrower} until about {until:%H:%M} UTC; retry then",
        retry_after_s=retry_after_s,
    )
