"""The work pool and the deployments, registered by the dispatcher at every start."""

import sys
import typing
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from pydantic.fields import FieldInfo

from flows.round import cotrain_round
from infra.settings import Settings

POOL = "cotrain"
NAME = "local"
FULL_NAME = f"{cotrain_round.name}/{NAME}"
SLUG = "calendar"


def register(client: SyncPrefectClient, settings: Settings) -> None:
    """Make pool and deployment what the code says; ids and switches that operators set stay."""
    client.create_work_pool(
        WorkPoolCreate(name=POOL, type="process", base_job_template=ProcessWorker.get_default_base_job_template()),
        overwrite=True,
    )
    work = settings.home / "work"
    work.mkdir(parents=True, exist_ok=True)
    client.create_deployment(
        flow_id=client.create_flow_from_name(cotrain_round.name),
        name=NAME,
        entrypoint="flows.round.cotrain_round",
        work_pool_name=POOL,
        parameter_openapi_schema=described_parameters(cotrain_round.fn),
        enforce_parameter_schema=True,
        description=cotrain_round.description,
        paused=None,
        tags=["cotrain"],
        schedules=[_calendar(client, settings)],
        job_variables={"command": f"{sys.executable} -m flows.engine", "working_dir": str(work)},
    )


def _calendar(client: SyncPrefectClient, settings: Settings) -> DeploymentScheduleCreate:
    """The programme's collecting day; a calendar that an operator switched off stays off."""
    cron = CronSchedule(cron=settings.calendar, timezone=settings.time_zone)
    return DeploymentScheduleCreate(schedule=cron, active=_is_active(client), slug=SLUG)


def _is_active(client: SyncPrefectClient) -> bool:
    try:
        schedules = client.read_deployment_by_name(FULL_NAME).schedules
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
