"""Read deployments, the work pool, workers and flow runs from Prefect's HTTP API.

Prefect's own client is not used here: importing it takes a second, more than all probes together, and the keeper and
`cotrain status` would have to import it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from flows.allowed_flows import WORK_POOL_NAME
from infra.settings import PrefectAccess


@dataclass(frozen=True, kw_only=True)
class DeploymentRecord:
    """Hold what the probes read of a deployment."""

    name: str
    is_paused: bool


@dataclass(frozen=True, kw_only=True)
class WorkPoolRecord:
    """Hold what the probes read of the work pool; without a limit, `concurrency_limit` is None."""

    is_paused: bool
    concurrency_limit: int | None


@dataclass(frozen=True)
class FlowRunState:
    """Hold the state of a flow run in Prefect, such as RUNNING, and the time since which it has it."""

    type: str
    message: str | None
    since: datetime


@dataclass(frozen=True, kw_only=True)
class FlowRunRecord:
    """Hold a flow run as Prefect's API returns it; a time is None if it is not set."""

    name: str
    state: FlowRunState | None
    expected_at: datetime | None
    started_at: datetime | None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "FlowRunRecord":
        """Read the fields of a response of Prefect's API."""
        state = fields["state"]
        return cls(
            name=fields["name"],
            state=state and FlowRunState(state["type"], state["message"], datetime.fromisoformat(state["timestamp"])),
            expected_at=_parse_time(fields["expected_start_time"]),
            started_at=_parse_time(fields["start_time"]),
        )


def _parse_time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def open_prefect_client(settings: PrefectAccess, timeout_s: float) -> httpx.Client:
    """Open a client of Prefect's API."""
    user, _, password = settings.prefect_auth.get_secret_value().partition(":")
    return httpx.Client(base_url=settings.prefect_api_url, auth=(user, password), timeout=timeout_s)


def fetch_deployments(http: httpx.Client) -> list[DeploymentRecord]:
    deployments = http.post("/deployments/filter", json={}).raise_for_status().json()
    return [DeploymentRecord(name=fields["name"], is_paused=fields["paused"]) for fields in deployments]


def fetch_work_pool(http: httpx.Client) -> WorkPoolRecord:
    fields = http.get(f"/work_pools/{WORK_POOL_NAME}").raise_for_status().json()
    return WorkPoolRecord(is_paused=fields["is_paused"], concurrency_limit=fields["concurrency_limit"])


def has_online_worker(http: httpx.Client) -> bool:
    """Return True if Prefect counts a worker of the work pool as online, by the worker's heartbeats."""
    workers = http.post(f"/work_pools/{WORK_POOL_NAME}/workers/filter", json={}).raise_for_status().json()
    return any(worker["status"] == "ONLINE" for worker in workers)


def fetch_first_flow_run(
    http: httpx.Client, flow_run_filter: Mapping[str, Any], *, sort: str, flow: str | None = None
) -> FlowRunRecord | None:
    """Fetch the first flow run that matches a filter of Prefect's API, of any flow or of the given one.

    Args:
        sort: Prefect's name of an order, such as START_TIME_DESC for the newest first.
    """
    body = {"flow_runs": flow_run_filter, "sort": sort, "limit": 1}
    if flow is not None:
        body["flows"] = {"name": {"any_": [flow]}}
    runs = http.post("/flow_runs/filter", json=body).raise_for_status().json()
    return FlowRunRecord.from_json(runs[0]) if runs else None
