"""Probes of Prefect: flow runs start, the running round has one, and reports were reproduced."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import httpx

from feedback.platform_facts import PlatformFacts
from flows.allowed_flows import REPRODUCE_FLOW, WORK_POOL_NAME, make_attempt_run_name
from flows.duties import compute_age_s
from flows.stack.findings import Finding, get_utc_now
from flows.stack.prefect_api import (
    fetch_deployments,
    fetch_first_flow_run,
    fetch_work_pool,
    has_online_worker,
    open_prefect_client,
)
from flows.stack.probe_runner import LATE_AFTER_S, PROBE_TIMEOUT_S
from infra.settings import FlowSettings

# Subjects of findings: those of a probe, and of Prefect if it does not answer the probe.
FLOW_RUN_SUBJECT = "a flow run that starts"
RUNNING_ROUND_SUBJECT = "the running round"
REPRODUCTION_SUBJECT = "the last processing of reports"

RESUME_FIX = "switch it on at its page in Prefect"
WORKER_LOG_FIX = "see `cotrain logs worker`"


@dataclass(frozen=True)
class _StartFault:
    """Hold a fault that keeps flow runs from starting, and its fix."""

    fault: str
    fix: str


def probe_flow_runs(settings: FlowSettings) -> list[Finding]:
    """Check that Prefect has its database, an online worker and active deployments, and starts due runs."""
    with open_prefect_client(settings, PROBE_TIMEOUT_S) as http:
        if http.get("/ready").status_code != 200:
            fault, fix = "Prefect's database does not answer", "see `cotrain logs postgres`"
            return [Finding(FLOW_RUN_SUBJECT, fault=fault, fix=fix)]
        newest = fetch_first_flow_run(http, {"start_time": {"is_null_": False}}, sort="START_TIME_DESC")
        started_at = newest.started_at if newest else None
        start_faults = list(_find_start_faults(http))
    findings = [
        Finding(FLOW_RUN_SUBJECT, succeeded_at=started_at, fault=start_fault.fault, fix=start_fault.fix)
        for start_fault in start_faults
    ]
    return findings or [Finding(FLOW_RUN_SUBJECT, succeeded_at=started_at)]


def _find_start_faults(http: httpx.Client) -> Iterator[_StartFault]:
    deployments = fetch_deployments(http)
    if not deployments:
        yield _StartFault(
            "Prefect has no deployment of this platform", "the dispatcher registers them; see `cotrain logs dispatcher`"
        )
        return
    for deployment in deployments:
        if deployment.is_paused:
            yield _StartFault(f"the deployment {deployment.name} is paused in Prefect", RESUME_FIX)
    yield from _find_pool_faults(http)

    due_before = (get_utc_now() - timedelta(seconds=LATE_AFTER_S)).isoformat()
    late_filter = {
        "state": {"type": {"any_": ["SCHEDULED", "PENDING"]}},
        "expected_start_time": {"before_": due_before},
    }
    if late := fetch_first_flow_run(http, late_filter, sort="EXPECTED_START_TIME_DESC"):
        yield _StartFault(f"flow run {late.name} waits since {late.expected_at:%F %T}", WORKER_LOG_FIX)


def _find_pool_faults(http: httpx.Client) -> Iterator[_StartFault]:
    pool = fetch_work_pool(http)
    if pool.is_paused:
        yield _StartFault(f"the work pool {WORK_POOL_NAME} is paused in Prefect", RESUME_FIX)
    if pool.concurrency_limit is not None:
        yield _StartFault(
            f"the work pool {WORK_POOL_NAME} in Prefect has a concurrency limit of {pool.concurrency_limit}, beyond "
            "which no flow run starts",
            "the dispatcher takes it back within five minutes; see `cotrain logs dispatcher`",
        )
    if not has_online_worker(http):
        yield _StartFault("no worker is online, so that no flow run starts", WORKER_LOG_FIX)


def probe_running_round(settings: FlowSettings, facts: PlatformFacts) -> list[Finding]:
    """Check that the running round has a running flow run."""
    training_round = facts.running
    if training_round is None:
        return []
    fix = "the dispatcher starts its next attempt; if it does not, see `cotrain logs dispatcher`"
    name = make_attempt_run_name(training_round.number, training_round.attempt)
    with open_prefect_client(settings, PROBE_TIMEOUT_S) as http:
        run = fetch_first_flow_run(http, {"name": {"any_": [name]}}, sort="START_TIME_DESC")
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
    ended_filter = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
    with open_prefect_client(settings, PROBE_TIMEOUT_S) as http:
        run = fetch_first_flow_run(http, ended_filter, sort="END_TIME_DESC", flow=REPRODUCE_FLOW)
    if run is None or run.state is None or run.state.type == "COMPLETED":
        return []
    fault = (
        f"{facts.num_reports_waiting} reports wait, and the last run of {REPRODUCE_FLOW} failed: {run.state.message}"
    )
    return [
        Finding(
            REPRODUCTION_SUBJECT,
            succeeded_at=facts.last_reproduction,
            fault=fault,
            fix="the dispatcher retries within two minutes; see `cotrain logs flows`",
            never_succeeded=facts.last_reproduction is None,
        )
    ]
