"""End-to-end probes of the stack's functions: each queries one server, concurrently and within a time limit.

Those of Prefect are in `flows.stack.prefect_probes`.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import httpx
from sqlalchemy.exc import OperationalError

from feedback.platform_facts import PlatformFacts, read_platform_facts
from flows.allowed_flows import REPRODUCE_FLOW
from flows.context import Context
from flows.duties import Duty, DutyStatus, compute_age_s, get_duty_status_file, read_duty_statuses
from flows.round.versions import describe_registration
from flows.stack.prefect_probes import (
    FLOW_RUN_SUBJECT,
    REPRODUCTION_SUBJECT,
    RUNNING_ROUND_SUBJECT,
    probe_flow_runs,
    probe_last_reproduction,
    probe_running_round,
)
from flows.stack.probing import (
    LATE_AFTER_S,
    PROBE_TIMEOUT_S,
    Finding,
    LastSuccess,
    Probe,
    convert_timestamp,
    get_utc_now,
    run_probes,
)
from infra.confinement import parse_port
from infra.keeper_state import ServiceState, read_service_states
from infra.listeners import describe_callers
from infra.object_store import open_object_store
from infra.settings import FlowSettings
from yuan.version_names import format_model_name

# A condition that clears by itself within this time is not a fault.
PROMOTION_SETTLE_S, REPORTS_LATE_AFTER_S = 30.0, 600.0
# Subjects of findings: those of a probe and those of a server that does not answer the probe.
RECORDS_SUBJECT, PORTAL_SUBJECT, OBJECT_SUBJECT = "the records", "the portal", "an object put and read"
MODEL_SUBJECT, ALIAS_SUBJECT = "an answer from the model", "an alias that follows"
# The duty whose success shows that a server answers.
DUTY_BY_SERVER = {
    "postgres": Duty.ADVANCE_ROUND,
    "prefect": Duty.REGISTER_DEPLOYMENTS,
    "mlflow": Duty.UPDATE_ALIASES,
}
DUTY_FIXES: dict[str, str] = {
    Duty.UPDATE_ALIASES: "if a version is missing from the registry, register it again; else see `cotrain logs mlflow`",
    Duty.REGISTER_DEPLOYMENTS: "see `cotrain logs prefect`",
    Duty.END_LOST_FLOW_RUNS: "see `cotrain logs prefect`",
    Duty.ADVANCE_ROUND: "see `cotrain logs prefect`; `cotrain round cancel` ends the round",
    Duty.START_REPRODUCTION: "see `cotrain logs prefect`",
    Duty.RECLAIM_LEASES: "see that the file which COTRAIN_POOL names can be read",
}


def examine_stack(context: Context, limit_s: float = PROBE_TIMEOUT_S) -> list[Finding]:
    """Run every probe; a server that hangs affects only its own finding.

    Without PostgreSQL, the probes that compare with the records are skipped.
    """
    settings = context.settings
    gathered: list[PlatformFacts] = []

    def read() -> list[Finding]:
        try:
            with context.sessions() as session:
                gathered.append(read_platform_facts(session))
        except OperationalError as error:
            if "too many clients" not in str(error.orig):
                raise
            callers = describe_callers(parse_port(settings.database_url.get_secret_value()))
            fault = f"all connections of PostgreSQL are in use: {callers}"
            return [
                Finding(RECORDS_SUBJECT, fault=fault, fix="end the programs that hold them; services go on with theirs")
            ]
        return [Finding(RECORDS_SUBJECT, succeeded_at=get_utc_now())]

    found = run_probes(
        [Probe("postgres", RECORDS_SUBJECT, ask=read, last=find_last_success(settings.home, "postgres", None))],
        limit_s / 2,
    )
    known = gathered[0] if gathered else None

    def probe(server: str, what: str, ask: Callable[[], list[Finding]]) -> Probe:
        return Probe(server, what, ask=ask, last=find_last_success(settings.home, server, known))

    probes = [
        probe("portal", PORTAL_SUBJECT, lambda: probe_portal(settings)),
        probe("s3", OBJECT_SUBJECT, lambda: probe_objects(settings)),
        probe("prefect", FLOW_RUN_SUBJECT, lambda: probe_flow_runs(settings)),
    ]
    if known is not None:
        facts = known
        probes += [
            probe("model-server", MODEL_SUBJECT, lambda: probe_model(settings, facts)),
            probe("mlflow", ALIAS_SUBJECT, lambda: probe_registry(context, facts)),
            probe("prefect", RUNNING_ROUND_SUBJECT, lambda: probe_running_round(settings, facts)),
            probe("prefect", REPRODUCTION_SUBJECT, lambda: probe_last_reproduction(settings, facts)),
        ]
        found += [check_waiting_reports(facts), check_waiting_notices(facts)]
    return found + run_probes(probes, limit_s) + find_failing_duties(settings.home)


def find_last_success(home: Path, server: str, facts: PlatformFacts | None) -> LastSuccess:
    """Return the last known success of a server, from the records, the dispatcher's duties or the keeper.

    The keeper's time is the start of readiness; the server may have answered at any time after that.
    """
    ready_at = read_service_states(home).get(server, ServiceState()).ready_at
    ready = LastSuccess(convert_timestamp(ready_at), or_later=True) if ready_at else LastSuccess()
    duty = read_duty_statuses(get_duty_status_file(home)).get(DUTY_BY_SERVER.get(server, ""), DutyStatus())
    recorded = (facts.last_answer, facts.last_upload) if facts else (None, None)
    answered = {"portal": recorded, "model-server": recorded[:1], "s3": recorded[1:]}.get(server, ())
    seen = max((one for one in (get_last_success(duty), *answered) if one), default=None)
    return ready if seen is None or (ready.at is not None and ready.at > seen) else LastSuccess(seen)


def probe_portal(settings: FlowSettings) -> list[Finding]:
    """Check that the portal and its database answer."""
    httpx.get(f"{settings.portal_url}/health", timeout=PROBE_TIMEOUT_S).raise_for_status()
    return [Finding(PORTAL_SUBJECT, succeeded_at=get_utc_now())]


def probe_objects(settings: FlowSettings) -> list[Finding]:
    """Check that an object can be put and read back."""
    open_object_store(settings, attempts=1).check()
    return [Finding(OBJECT_SUBJECT, succeeded_at=get_utc_now())]


def probe_model(settings: FlowSettings, facts: PlatformFacts) -> list[Finding]:
    """Check that the champion generates one token."""
    fix = "see `cotrain logs model-server`"
    if facts.champion is None:
        return [Finding(MODEL_SUBJECT)]
    headers = {"Authorization": f"Bearer {settings.model_server_token.get_secret_value()}"}
    body = {"model": "yuan", "prompt": "1", "max_tokens": 1, "temperature": 0}
    answer = httpx.post(
        f"{settings.model_server_url}/v1/completions", json=body, headers=headers, timeout=PROBE_TIMEOUT_S
    )
    if not answer.is_success:
        fault = f"v{facts.champion}, the champion, gives no answer: the model server says {answer.status_code}"
        return [Finding(MODEL_SUBJECT, succeeded_at=facts.last_answer, fault=fault, fix=fix)]
    served = answer.json()["model"]
    if served != format_model_name(facts.champion) and compute_age_s(facts.promoted_at) > PROMOTION_SETTLE_S:
        fault = f"{served} answers, and the champion is v{facts.champion}"
        return [
            Finding(
                MODEL_SUBJECT,
                succeeded_at=facts.last_answer,
                fault=fault,
                fix=f"see that the alias follows; else {fix}",
            )
        ]
    return [Finding(MODEL_SUBJECT, succeeded_at=get_utc_now())]


def probe_registry(context: Context, facts: PlatformFacts) -> list[Finding]:
    """Check that the registry has the champion and its predecessor, and that the alias points at the champion."""
    found: list[Finding] = []
    with context.tracker.use_short_timeout():
        aliases = context.tracker.read_aliases()
        lost = [version for version in facts.lineage if not context.tracker.has_version(version)]
        missing = {
            one: context.tracker.find_missing_files(one, facts.files[one]) for one in facts.lineage if one not in lost
        }
    last = get_last_success(
        read_duty_statuses(get_duty_status_file(context.settings.home)).get(Duty.UPDATE_ALIASES, DutyStatus())
    )
    for version in lost:
        name = f"v{version}, the champion," if version == facts.champion else f"v{version}, the version before,"
        fix = describe_registration(context.settings.home, version, facts.lineage[version])
        # The champion existed when its alias was last set; of its predecessor only the promotion time is known.
        seen = last if version == facts.champion else facts.promoted_at
        found.append(
            Finding(
                f"v{version} in the registry", succeeded_at=seen, fault=f"{name} is missing from the registry", fix=fix
            )
        )
    for version, names in missing.items():
        if names:
            fault = f"v{version} is in the registry and its files are not in the store: {', '.join(names[:5])}"
            fix = describe_registration(context.settings.home, version, facts.lineage[version])
            found.append(Finding(f"the files of v{version}", succeeded_at=facts.promoted_at, fault=fault, fix=fix))
    is_due = compute_age_s(facts.promoted_at) > PROMOTION_SETTLE_S or last is None
    if facts.champion is None:
        return [Finding(ALIAS_SUBJECT)]
    if aliases.get("champion") != facts.champion and is_due:
        at = f"v{aliases['champion']}" if "champion" in aliases else "no version"
        fault = f"the alias champion points at {at}, and the champion is v{facts.champion}"
        fix = "register the version again, as said above" if facts.champion in lost else "see `cotrain logs dispatcher`"
        return [*found, Finding(ALIAS_SUBJECT, succeeded_at=last, fault=fault, fix=fix)]
    return [*found, Finding(ALIAS_SUBJECT, succeeded_at=last or get_utc_now())]


def check_waiting_reports(facts: PlatformFacts) -> Finding:
    """Check that no report waits longer than REPORTS_LATE_AFTER_S."""
    what, oldest = "a report that is reproduced", facts.oldest_report
    if facts.champion is None or oldest is None or compute_age_s(oldest) < REPORTS_LATE_AFTER_S:
        return Finding(what, succeeded_at=facts.last_reproduction)
    fault = f"{facts.num_reports_waiting} reports wait to be reproduced, the oldest since {oldest:%F %T}"
    fix = f"see `cotrain logs flows` and the flow {REPRODUCE_FLOW} in Prefect"
    return Finding(
        what, succeeded_at=facts.last_reproduction, fault=fault, fix=fix, never=facts.last_reproduction is None
    )


def check_waiting_notices(facts: PlatformFacts) -> Finding:
    """Check that no notice waits longer than LATE_AFTER_S."""
    oldest = facts.oldest_notice
    fault = (
        f"notices wait to be delivered since {oldest:%F %T}"
        if oldest and compute_age_s(oldest) > LATE_AFTER_S
        else None
    )
    fix = "see `cotrain logs dispatcher`" if fault else ""
    return Finding(
        "a notice delivered", succeeded_at=facts.last_notice, fault=fault, fix=fix, never=facts.last_notice is None
    )


def find_failing_duties(home: Path) -> list[Finding]:
    """Find the dispatcher's failing duties."""
    return [
        Finding(
            f"the dispatcher's duty: {name}",
            succeeded_at=get_last_success(standing),
            fault=f"the dispatcher cannot {name}, since {convert_timestamp(standing.failing_since):%F %T}, "
            f"{standing.failures} times: "
            f"{standing.error}",
            fix=DUTY_FIXES.get(name, "see `cotrain logs dispatcher`"),
            never=standing.succeeded_at is None,
        )
        for name, standing in read_duty_statuses(get_duty_status_file(home)).items()
        if standing.failing_since is not None
    ]


def get_last_success(standing: DutyStatus) -> datetime | None:
    """Return the time of a duty's last success."""
    return None if standing.succeeded_at is None else convert_timestamp(standing.succeeded_at)
