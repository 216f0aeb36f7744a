"""The work pool and the deployments, registered by the dispatcher at every start."""

from collections.abc import Sequence

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound

from flows.allowed_flows import (
    ALLOWED_FLOWS,
    CHECK_DATASETS_FLOW,
    CLEAN_UP_FLOW,
    REPRODUCE_FLOW,
    ROUND_FLOW,
    WORK_POOL_NAME,
)
from flows.prefect_gate.deployment_rules import DEPLOYMENT_NAME, WORK_POOL_TEMPLATE
from flows.recipe_files import find_recipe_files
from infra.settings import DispatcherSettings

ROUND_DEPLOYMENT = f"{ROUND_FLOW}/{DEPLOYMENT_NAME}"
REPRODUCE_DEPLOYMENT = f"{REPRODUCE_FLOW}/{DEPLOYMENT_NAME}"
CHECK_DATASETS_DEPLOYMENT = f"{CHECK_DATASETS_FLOW}/{DEPLOYMENT_NAME}"
CLEAN_UP_DEPLOYMENT = f"{CLEAN_UP_FLOW}/{DEPLOYMENT_NAME}"
CALENDAR_SCHEDULE_SLUG = "calendar"


def register_deployments(client: SyncPrefectClient, settings: DispatcherSettings) -> None:
    """Register the work pool and the deployments as defined in code; ids and operators' pause switches are kept.

    A concurrency limit of the pool is removed, since a limit of 0 would stop every flow run; the worker has a limit.
    """
    pool = WorkPoolCreate(
        name=WORK_POOL_NAME, type="process", base_job_template=WORK_POOL_TEMPLATE, concurrency_limit=None
    )
    client.create_work_pool(pool, overwrite=True)
    recipe_names = [file.name for file in find_recipe_files(settings.home)]
    deploy_flow(client, ROUND_FLOW, [_make_calendar_schedule(client, settings)], recipe_names)
    deploy_flow(client, REPRODUCE_FLOW, [])
    deploy_flow(client, CHECK_DATASETS_FLOW, [])
    deploy_flow(client, CLEAN_UP_FLOW, [])


def deploy_flow(
    client: SyncPrefectClient, name: str, schedules: list[DeploymentScheduleCreate], recipe_names: Sequence[str] = ()
) -> None:
    """Register a deployment of one of the allowed flows, which the worker looks up by name."""
    flow = ALLOWED_FLOWS[name]
    client.create_deployment(
        flow_id=client.create_flow_from_name(name),
        name=DEPLOYMENT_NAME,
        work_pool_name=WORK_POOL_NAME,
        parameter_openapi_schema=flow.build_schema(recipe_names),
        enforce_parameter_schema=True,
        description=flow.load().description,
        paused=None,
        tags=["cotrain"],
        schedules=schedules,
        job_variables={},
    )


def _make_calendar_schedule(client: SyncPrefectClient, settings: DispatcherSettings) -> DeploymentScheduleCreate:
    """Make the cron schedule of rounds from the settings; a schedule that an operator disabled stays disabled."""
    cron = CronSchedule(cron=settings.calendar, timezone=settings.time_zone)
    return DeploymentScheduleCreate(schedule=cron, active=_is_calendar_active(client), slug=CALENDAR_SCHEDULE_SLUG)


def _is_calendar_active(client: SyncPrefectClient) -> bool:
    try:
        schedules = client.read_deployment_by_name(ROUND_DEPLOYMENT).schedules
    except ObjectNotFound:
        return True
    return all(schedule.active for schedule in schedules)
