"""Probes of Prefect: flow runs start, the running round has one, and reports were reproduced.

Prefect is queried over HTTP, since importing its library takes longer than all probes together.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import httpx

from feedback.platform_facts import PlatformFacts
from flows.allowed_flows import REPRODUCE_FLOW, WORK_POOL_NAME, make_attempt_run_name
from flows.duties import compute_age_s
from flows.stack.probing import LATE_AFTER_S, PROBE_TIMEOUT_S, Finding, get_utc_now
from infra.settings import FlowSettings

# Subjects of findings: those of a probe, and of Prefect if it does not answer the probe.
FLOW_RUN_SUBJECT, RUNNING_ROUND_SUBJECT = "a flow run that starts", "the running round"
REPRODUCTION_SUBJECT = "the last processing of reports"
RESUME_FIX, WORKER_LOG_FIX = "switch it on at its page in Prefect", "see `cotrain logs worker`"


@dataclass(frozen=True)
class FlowRunState:
    """State of a flow run in Prefect, such as RUNNING, and since when."""

    type: str
    message: str | None
    since: datetime


@dataclass(frozen=True, kw_only=True)
class FlowRunRecord:
    """A flow run as Prefect's API returns it; a time is None if it is not set."""

    name: str
    state: FlowRunState | None
    expected_at: datetime | None
    started_at: datetime | None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "FlowRunRecord":
        """Read the fields of an answer of Prefect's API."""
        state = fields["state"]
        return cls(
            name=fields["name"],
            state=state and FlowRunState(state["type"], state["message"], datetime.fromisoformat(state["timestamp"])),
            expected_at=_parse_time(fields["expected_start_time"]),
            started_at=_parse_time(fields["start_time"]),
        )


def _parse_time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def probe_flow_runs(settings: FlowSettings) -> list[Finding]:
    """Check that Prefect has its database, an online worker and active deployments, and starts due runs."""
    with open_prefect_client(settings) as http:
        if http.get("/ready").status_code != 200:
            fault, fix = "Prefect's database does not answer", "see `cotrain logs postgres`"
            return [Finding(FLOW_RUN_SUBJECT, fault=fault, fix=fix)]
        newest = fetch_newest_flow_run(http, {"start_time": {"is_null_": False}}, "START_TIME_DESC")
        started = newest.started_at if newest else None
        faults = list(_find_start_faults(http))
    findings = [Finding(FLOW_RUN_SUBJECT, succeeded_at=started, fault=fault, fix=fix) for fault, fix in faults]
    return findings or [Finding(FLOW_RUN_SUBJECT, succeeded_at=started)]


def _find_start_faults(http: httpx.Client) -> Iterator[tuple[str, str]]:
    """Yield what keeps flow runs from starting: faults and their fixes."""
    deployments = http.post("/deployments/filter", json={}).raise_for_status().json()
    if not deployments:
        yield (
            "Prefect has no deployment of this platform",
            "the dispatcher registers them; see `cotrain logs dispatcher`",
        )
        return
    for deployment in deployments:
        if deployment["paused"]:
            yield f"the deployment {deployment['name']} is paused in Prefect", RESUME_FIX
    yield from _find_pool_faults(http)

    due = (get_utc_now() - timedelta(seconds=LATE_AFTER_S)).isoformat()
    which = {"state": {"type": {"any_": ["SCHEDULED", "PENDING"]}}, "expected_start_time": {"before_": due}}
    if late := fetch_newest_flow_run(http, which, "EXPECTED_START_TIME_DESC"):
        yield f"flow run {late.name} waits since {late.expected_at:%F %T}", WORKER_LOG_FIX


def _find_pool_faults(http: httpx.Client) -> Iterator[tuple[str, str]]:
    """Yield the faults of the work pool and its workers, and their fixes."""
    pool = http.get(f"/work_pools/{WORK_POOL_NAME}").raise_for_status().json()
    if pool["is_paused"]:
        yield f"the work pool {WORK_POOL_NAME} is paused in Prefect", RESUME_FIX
    if (limit := pool["concurrency_limit"]) is not None:
        where = f"the work pool {WORK_POOL_NAME} in Prefect"
        fix = "the dispatcher takes it back within five minutes; see `cotrain logs dispatcher`"
        yield f"{where} has a concurrency limit of {limit}, beyond which no flow run starts", fix
    workers = http.post(f"/work_pools/{WORK_POOL_NAME}/workers/filter", json={}).raise_for_status().json()
    if not any(worker["status"] == "ONLINE" for worker in workers):
        yield "no worker is online, so that no flow run starts", WORKER_LOG_FIX


def probe_running_round(settings: FlowSettings, facts: PlatformFacts) -> list[Finding]:
    """Check that the running round has a running flow run."""
    training_round = facts.running
    if training_round is None:
        return []
    fix = "the dispatcher starts its next attempt; if it does not, see `cotrain logs dispatcher`"
    with open_prefect_client(settings) as http:
        name = make_attempt_run_name(training_round.number, training_round.attempt)
        run = fetch_newest_flow_run(http, {"name": {"any_": [name]}}, "START_TIME_DESC")
    state = run.state if run else None
    if state and state.type == "RUNNING":
        return [Finding(RUNNING_ROUND_SUBJECT, succeeded_at=get_utc_now())]
    since = state.since if state else training_round.created_at
    if compute_age_s(since) < LATE_AFTER_S:
        return [Finding(RUNNING_ROUND_SUBJECT, succeeded_at=since)]
    run_state = f"its flow run is {state.type.lower()}" if state else "it has no flow run"
    fault = f"round {training_round.number} is at {training_round.step} and {run_state} since {since:%F %T}"
    return [
        Finding(RUNNING_ROUND_SUBJECT, succeeded_at=since if run and run.started_at else None, fault=fault, fix=fix)
    ]


def probe_last_reproduction(settings: FlowSettings, facts: PlatformFacts) -> list[Finding]:
    """Check that the last reproduction flow run did not fail while reports wait."""
    if not facts.num_reports_waiting:
        return []
    ended = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
    with open_prefect_client(settings) as http:
        run = fetch_newest_flow_run(http, ended, "END_TIME_DESC", flow=REPRODUCE_FLOW)
    if run is None or run.state is None or run.state.type == "COMPLETED":
        return []
    fault = (
        f"{facts.num_reports_waiting} reports wait, and the last run of {REPRODUCE_FLOW} failed: {run.state.message}"
    )
    fix = "the dispatcher retries within two minutes; see `cotrain logs flows`"
    at = facts.last_reproduction
    return [Finding(REPRODUCTION_SUBJECT, succeeded_at=at, fault=fault, fix=fix, never=at is None)]


def open_prefect_client(settings: FlowSettings) -> httpx.Client:
    """Open a client of Prefect's API."""
    user, _, password = settings.prefect_auth.get_secret_value().partition(":")
    return httpx.Client(base_url=settings.prefect_api_url, auth=(user, password), timeout=PROBE_TIMEOUT_S)


def fetch_newest_flow_run(
    http: httpx.Client, which: Mapping[str, Any], sort: str, flow: str | None = None
) -> FlowRunRecord | None:
    """Fetch the first flow run that matches a filter, of any flow or of the given one."""
    body = {"flow_runs": which, "sort": sort, "limit": 1}
    if flow is not None:
        body["flows"] = {"name": {"any_": [flow]}}
    answer = http.post("/flow_runs/filter", json=body).raise_for_status().json()
    return FlowRunRecord.from_json(answer[0]) if answer else None
