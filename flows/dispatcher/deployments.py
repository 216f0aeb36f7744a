"""The work pool and the deployments, registered by the dispatcher at every start."""

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound

from flows.prefect_gate.deployment_rules import NAME, POOL, TEMPLATE
from flows.registry import REGISTERED
from infra.settings import DispatcherSettings

ROUND = f"cotrain-round/{NAME}"
REPRODUCE = f"cotrain-reproduce/{NAME}"
SLUG = "calendar"


def register(client: SyncPrefectClient, settings: DispatcherSettings) -> None:
    """Make pool and deployments what the code says; ids and switches that operators set stay.

    A concurrency limit of the pool is taken back, since one of 0 would stop every flow run; the worker has a limit.
    """
    pool = WorkPoolCreate(name=POOL, type="process", base_job_template=TEMPLATE, concurrency_limit=None)
    client.create_work_pool(pool, overwrite=True)
    deploy(client, "cotrain-round", [_calendar(client, settings)])
    deploy(client, "cotrain-reproduce", [])


def deploy(client: SyncPrefectClient, name: str, schedules: list[DeploymentScheduleCreate]) -> None:
    """Register one flow of `flows.registry`, which the worker finds there by its name."""
    registered = REGISTERED[name]
    client.create_deployment(
        flow_id=client.create_flow_from_name(name),
        name=NAME,
        work_pool_name=POOL,
        parameter_openapi_schema=registered.schema(),
        enforce_parameter_schema=True,
        description=registered.load().description,
        paused=None,
        tags=["cotrain"],
        schedules=schedules,
        job_variables={},
    )


def _calendar(client: SyncPrefectClient, settings: DispatcherSettings) -> DeploymentScheduleCreate:
    """The programme's collecting day; a calendar that an operator switched off stays off."""
    cron = CronSchedule(cron=settings.calendar, timezone=settings.time_zone)
    return DeploymentScheduleCreate(schedule=cron, active=_is_active(client), slug=SLUG)


def _is_active(client: SyncPrefectClient) -> bool:
    try:
        schedules = client.read_deployment_by_name(ROUND).schedules
    except ObjectNotFound:
        return True
    return all(schedule.active for schedule in schedules)
