"""The work pool and the deployments, registered by the dispatcher at every start."""

import sys
import typing
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from pydantic.fields import FieldInfo

from flows.reproduction import cotrain_reproduce
from flows.round import cotrain_round
from infra.settings import DispatcherSettings

POOL = "cotrain"
NAME = "local"
ROUND = f"{cotrain_round.name}/{NAME}"
REPRODUCE = f"{cotrain_reproduce.name}/{NAME}"
SLUG = "calendar"


def register(client: SyncPrefectClient, settings: DispatcherSettings) -> None:
    """Make pool and deployments what the code says; ids and switches that operators set stay."""
    client.create_work_pool(
        WorkPoolCreate(name=POOL, type="process", base_job_template=ProcessWorker.get_default_base_job_template()),
        overwrite=True,
    )
    deploy(client, settings, cotrain_round, "flows.round.cotrain_round", [_calendar(client, settings)])
    deploy(client, settings, cotrain_reproduce, "flows.reproduction.cotrain_reproduce", [])


def deploy(
    client: SyncPrefectClient,
    settings: DispatcherSettings,
    flow: Flow[..., Any],
    entrypoint: str,
    schedules: list[DeploymentScheduleCreate],
) -> None:
    """Register one flow, run by the worker through `flows.engine`."""
    work = settings.home / "work"
    work.mkdir(parents=True, exist_ok=True)
    client.create_deployment(
        flow_id=client.create_flow_from_name(flow.name),
        name=NAME,
        entrypoint=entrypoint,
        work_pool_name=POOL,
        parameter_openapi_schema=described_parameters(flow.fn),
        enforce_parameter_schema=True,
        description=flow.description,
        paused=None,
        tags=["cotrain"],
        schedules=schedules,
        job_variables={"command": f"{sys.executable} -m flows.engine", "working_dir": str(work)},
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


def described_parameters(function: Any) -> dict[str, Any]:
    """The Run form's schema; Prefect itself drops descriptions given in Annotated."""
    schema: dict[str, Any] = parameter_schema(function).model_dump_for_openapi()
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        for extra in getattr(hint, "__metadata__", ()):
            if isinstance(extra, FieldInfo) and extra.description and name in schema["properties"]:
                schema["properties"][name]["description"] = extra.description
    return schema
