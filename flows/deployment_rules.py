"""Which flows, deployments and schedules may be written to Prefect: those that the code registers, and slow ones.

One request could otherwise make schedules that start hundreds of flow runs a minute, or keep the server's scheduler
busy for ever: it looks for a rule's next date until the year 9999.
"""

import re
from datetime import datetime, timezone
from typing import Any

from prefect._vendor.croniter.croniter import croniter  # the server's own

from flows.registry import REGISTERED

NAME = "local"  # of every deployment that flows/deployments.py registers
MAX_SCHEDULES = 4
MIN_INTERVAL_S = 60
MAX_CRON_CHARACTERS = 100
ONE_SCHEDULE = re.compile(r"/api/deployments/[^/]+/schedules/[^/]+")


def is_bounded(path: str) -> bool:
    """Tell whether these rules say anything of a path."""
    return path in ("/api/flows/", "/api/deployments/") or ONE_SCHEDULE.fullmatch(path) is not None


def find_foreign_deployment(path: str, form: Any) -> str | None:
    """Return why a body must not reach the server, None if it may.

    >>> find_foreign_deployment("/api/flows/", {"name": "mine"})
    'only the flows cotrain-round, cotrain-reproduce are run here; register another in flows/registry.py'
    >>> find_foreign_deployment("/api/deployments/", {"name": "local", "schedules": [{"schedule": {"interval": 1}}]})
    'a schedule must be an interval of at least 60 s or a cron of five fields that comes due; send one of these'
    """
    if not is_bounded(path):
        return None
    if not isinstance(form, dict):
        return "the body must be a JSON object; send one"
    if path == "/api/flows/":
        if form.get("name") in list(REGISTERED):
            return None
        return f"only the flows {', '.join(REGISTERED)} are run here; register another in flows/registry.py"
    if path != "/api/deployments/":
        return None if form.get("schedule") is None else _find_schedule_fault(form["schedule"])
    if form.get("name") != NAME:
        return f"a deployment's name must be {NAME!r}, which flows/deployments.py registers; start that one"
    schedules = form.get("schedules", [])
    if not isinstance(schedules, list) or len(schedules) > MAX_SCHEDULES:
        return f"a deployment may have a list of {MAX_SCHEDULES} schedules; send less"
    faults = (_find_schedule_fault(one.get("schedule") if isinstance(one, dict) else None) for one in schedules)
    return next((fault for fault in faults if fault is not None), None)


def _find_schedule_fault(schedule: Any) -> str | None:
    is_single = isinstance(schedule, dict) and len({"interval", "cron", "rrule"} & schedule.keys()) == 1
    if is_single and (_is_slow(schedule.get("interval")) or _comes_due(schedule.get("cron"))):
        return None
    return (
        f"a schedule must be an interval of at least {MIN_INTERVAL_S} s or a cron of five fields that comes due; "
        "send one of these"
    )


def _is_slow(interval: Any) -> bool:
    """Tell whether an interval is a number of seconds, as Prefect's client and pages send it, that is long enough."""
    return isinstance(interval, (int, float)) and interval >= MIN_INTERVAL_S


def _comes_due(cron: Any) -> bool:
    """Tell whether a cron counts in minutes, not in seconds by a sixth field, and has a next date."""
    if not isinstance(cron, str) or len(cron) > MAX_CRON_CHARACTERS or len(cron.split()) != 5:
        return False
    try:
        croniter(cron, datetime.now(timezone.utc)).get_next()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, KeyError, OverflowError):
        return False
    return True
