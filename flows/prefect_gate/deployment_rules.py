"""Restrict writes of work pools, flows, deployments and schedules to those of the code, and to slow schedules.

Otherwise one request could create schedules that start hundreds of flow runs per minute, or keep the server's scheduler
busy indefinitely: it searches for a rule's next date until the year 9999. A deployment's concurrency limit, for
example, ends active runs when the server refuses to renew their slots.
"""

import json
import re
from datetime import datetime, timezone
from typing import Any
from zoneinfo import available_timezones

from prefect._vendor.croniter.croniter import croniter  # the server's own

from flows.allowed_flows import ALLOWED_FLOWS, WORK_POOL_NAME, is_schema_of_flow
from infra.settings import UNUSABLE_TIME_ZONES
from yuan.data.text import make_printable

# Shown on Prefect's pages: the pool has no variables, and this command always runs, whatever is written there.
WORK_POOL_TEMPLATE: dict[str, Any] = {
    "job_configuration": {"command": "python -I -m flows.dispatcher.flow_process"},
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}
TIME_ZONES = frozenset(available_timezones()) - UNUSABLE_TIME_ZONES
DEPLOYMENT_NAME = "local"  # of every deployment that flows/dispatcher/deployments.py registers
# The fields of a deployment as flows/dispatcher/deployments.py sends them; others are its flow, schema and schedules.
DEPLOYMENT_FIXED_FIELDS: dict[str, Any] = {
    "name": DEPLOYMENT_NAME,
    "enforce_parameter_schema": True,
    "parameters": {},
    "tags": ["cotrain"],
    "labels": {},
    "job_variables": {},
    "work_pool_name": WORK_POOL_NAME,
    "work_queue_name": None,
    "concurrency_limit": None,
    "concurrency_options": None,
    "storage_document_id": None,
    "infrastructure_document_id": None,
    "path": None,
    "entrypoint": None,
    "version": None,
}
DEPLOYMENT_FREE_FIELDS = frozenset({"flow_id", "description", "parameter_openapi_schema", "schedules"})
SCHEDULE_FIXED_FIELDS: dict[str, Any] = {"max_scheduled_runs": None, "parameters": {}, "replaces": None}
SCHEDULE_FREE_FIELDS = frozenset({"schedule", "active", "slug"})
MAX_SCHEDULES = 4
MIN_SCHEDULE_INTERVAL_S = 60
MAX_CRON_CHARACTERS = 100
WORK_POOL_PATH = re.compile(r"/api/work_pools/[^/]+")
SCHEDULE_PATH = re.compile(r"/api/deployments/[^/]+/schedules/[^/]+")


def find_foreign_deployment(path: str, form: Any) -> str | None:
    """Describe why a body must not reach the server; None if it may.

    >>> find_foreign_deployment("/api/flows/", {"name": "mine"})  # doctest: +ELLIPSIS
    'only the flows cotrain-round, ... are run here; add another to flows/allowed_flows.py'
    >>> find_foreign_deployment("/api/deployments/", {**DEPLOYMENT_FIXED_FIELDS, "concurrency_limit": 1})
    'concurrency_limit must be null, as flows/dispatcher/deployments.py sends it, got 1; leave it as registered'
    """
    if path == "/api/work_pools/" or WORK_POOL_PATH.fullmatch(path) is not None:
        template = form.get("base_job_template") if isinstance(form, dict) else None
        return (
            None
            if template in (None, WORK_POOL_TEMPLATE)
            else _describe_changed_field("base_job_template", WORK_POOL_TEMPLATE, template)
        )
    if path not in ("/api/flows/", "/api/deployments/") and SCHEDULE_PATH.fullmatch(path) is None:
        return None
    if not isinstance(form, dict):
        return "the body must be a JSON object; send one"
    if path == "/api/flows/":
        if form.get("name") in list(ALLOWED_FLOWS):
            return None
        return f"only the flows {', '.join(ALLOWED_FLOWS)} are run here; add another to flows/allowed_flows.py"
    if path != "/api/deployments/":
        return _find_schedule_fault(form, is_whole=False)
    if fault := _find_foreign_field(form, DEPLOYMENT_FIXED_FIELDS, DEPLOYMENT_FREE_FIELDS):
        return fault
    if not is_schema_of_flow(form.get("parameter_openapi_schema")):
        return "parameter_openapi_schema must be the schema of a flow in flows/allowed_flows.py; send that one"
    schedules = form.get("schedules", [])
    if not isinstance(schedules, list) or len(schedules) > MAX_SCHEDULES:
        return f"a deployment may have a list of {MAX_SCHEDULES} schedules; send less"
    faults = (_find_schedule_fault(schedule, is_whole=True) for schedule in schedules)
    return next((fault for fault in faults if fault is not None), None)


def _find_foreign_field(form: dict[str, Any], fixed: dict[str, Any], free: frozenset[str]) -> str | None:
    """Describe a field that the platform does not send, or sends with another value; empty fields may be missing."""
    for field in sorted(fixed.keys() | form.keys() - free):
        if field not in fixed:
            return f"{make_printable(field, 60)} is no field that flows/dispatcher/deployments.py sends; leave it out"
        value, fixed_value = form.get(field), fixed[field]
        if value != fixed_value and (value is not None or fixed_value):
            return _describe_changed_field(field, fixed_value, value)
    return None


def _describe_changed_field(field: str, fixed_value: Any, value: Any) -> str:
    rule = f"{field} must be {json.dumps(fixed_value)}, as flows/dispatcher/deployments.py sends it"
    return f"{rule}, got {make_printable(json.dumps(value), 60)}; leave it as registered"


def _find_schedule_fault(form: Any, *, is_whole: bool) -> str | None:
    """Check a schedule with its `active` switch; a partial one (`is_whole=False`) may change only the switch."""
    if isinstance(form, dict):
        if fault := _find_foreign_field(form, SCHEDULE_FIXED_FIELDS, SCHEDULE_FREE_FIELDS):
            return fault
        if not is_whole and form.get("schedule") is None:
            return None
    return _find_interval_fault(form.get("schedule") if isinstance(form, dict) else None)


def _find_interval_fault(schedule: Any) -> str | None:
    zone = schedule.get("timezone") if isinstance(schedule, dict) else None
    if zone is not None and not (isinstance(zone, str) and zone in TIME_ZONES):
        return (
            "timezone of a schedule must be one like Asia/Shanghai, "
            f"got {make_printable(str(zone), 60)}; send such a one"
        )
    is_single = isinstance(schedule, dict) and len({"interval", "cron", "rrule"} & schedule.keys()) == 1
    if is_single and (_is_slow_interval(schedule.get("interval")) or _has_next_date(schedule.get("cron"))):
        return None
    return (
        f"a schedule must be an interval of at least {MIN_SCHEDULE_INTERVAL_S} s or a cron of five fields "
        "that comes due; send one of these"
    )


def _is_slow_interval(interval: Any) -> bool:
    """Return True if an interval is a number of at least MIN_SCHEDULE_INTERVAL_S, the form that clients send."""
    return isinstance(interval, (int, float)) and interval >= MIN_SCHEDULE_INTERVAL_S


def _has_next_date(cron: Any) -> bool:
    """Return True if a cron expression has five fields (a sixth one would be seconds) and a next date."""
    if not isinstance(cron, str) or len(cron) > MAX_CRON_CHARACTERS or len(cron.split()) != 5:
        return False
    try:
        croniter(cron, datetime.now(timezone.utc)).get_next()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, KeyError, OverflowError):
        return False
    return True
