"""End-to-end probes of the stack's functions: each queries one server, concurrently and within a time limit.

Those of Prefect are in `flows.stack.prefect_probes`.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import httpx
from sqlalchemy.exc import OperationalError

from feedback.contracts import WeightsProvenance
from feedback.platform_facts import PlatformFacts, read_platform_facts
from feedback.reproduce import parse_error_message
from flows.allowed_flows import REPRODUCE_FLOW
from flows.context import Context
from flows.duties import Duty, DutyStatus, compute_age_s, get_duty_status_file, read_duty_statuses
from flows.round.versions import describe_registration
from flows.stack.findings import Finding, convert_timestamp, get_utc_now
from flows.stack.prefect_probes import (
    FLOW_RUN_SUBJECT,
    REPRODUCTION_SUBJECT,
    RUNNING_ROUND_SUBJECT,
    probe_flow_runs,
    probe_last_reproduction,
    probe_running_round,
)
from flows.stack.probe_runner import LATE_AFTER_S, PROBE_TIMEOUT_S, LastSuccess, Probe, run_probes
from infra.confinement import parse_port
from infra.keeper_state import ServiceState, read_service_states
from infra.listeners import describe_callers
from infra.object_store import open_object_store
from infra.settings import FlowSettings
from yuan.version_names import format_model_name

# A condition that clears by itself within this time is not a fault.
PROMOTION_SETTLE_S = 30.0
REPORTS_LATE_AFTER_S = 600.0
# Subjects of findings: those of a probe and those of a server that does not answer the probe.
RECORDS_SUBJECT = "the records"
PORTAL_SUBJECT = "the portal"
OBJECT_SUBJECT = "an object put and read"
MODEL_SUBJECT = "an answer from the model"
ALIAS_SUBJECT = "an alias that follows"
REPORTS_SUBJECT = "a report that is reproduced"
NOTICES_SUBJECT = "a notice delivered"
# The duty whose success shows that a server answers.
DUTY_BY_SERVER = {
    "postgres": Duty.ADVANCE_ROUND,
    "prefect": Duty.REGISTER_DEPLOYMENTS,
    "mlflow": Duty.UPDATE_ALIASES,
}
DUTY_FIXES: dict[str, str] = {
    Duty.DELETE_CHECKPOINTS: "see the run that it names, and `cotrain logs s3`",
    Duty.SHARE_DEVICES: "see `cotrain logs model-server` and `cotrain pool show`",
    Duty.UPDATE_ALIASES: "if a version is missing from the registry, register it again; else see `cotrain logs mlflow`",
    Duty.CACHE_CHAMPION: "if it is missing from the registry, register it again; if the disk is full, make room",
    Duty.REGISTER_DEPLOYMENTS: "see `cotrain logs prefect`",
    Duty.END_LOST_FLOW_RUNS: "see `cotrain logs prefect`",
    Duty.ADVANCE_ROUND: "see `cotrain logs prefect`; `cotrain round cancel` ends the round",
    Duty.START_REPRODUCTION: "see `cotrain logs prefect`",
    Duty.START_DATASET_CHECKS: "see `cotrain logs prefect`",
    Duty.START_CLEANUP: "see `cotrain logs prefect`",
    Duty.RECLAIM_LEASES: "see that the file which COTRAIN_POOL names can be read, and end the processes that are named",
}


def examine_stack(context: Context, limit_s: float = PROBE_TIMEOUT_S) -> list[Finding]:
    """Run every probe; a server that hangs affects only its own finding.

    Without PostgreSQL, the probes that compare with the records are skipped.
    """
    settings = context.settings
    facts_read: list[PlatformFacts] = []  # one if the records can be read

    def probe_records() -> list[Finding]:
        try:
            with context.sessions() as session:
                facts_read.append(read_platform_facts(session))
        except OperationalError as error:
            if "too many clients" not in str(error.orig):
                raise
            return [_describe_used_connections(settings)]
        return [Finding(RECORDS_SUBJECT, succeeded_at=get_utc_now())]

    last_success = find_last_success(settings.home, "postgres", None)
    records = Probe("postgres", RECORDS_SUBJECT, check=probe_records, last_success=last_success)
    findings = run_probes([records], limit_s / 2)

    facts = facts_read[0] if facts_read else None
    probes = make_server_probes(context, facts)
    if facts is not None:
        findings += [check_waiting_reports(facts), check_waiting_notices(facts), *check_masters(facts)]
    return findings + run_probes(probes, limit_s) + find_failing_duties(settings.home)


def _describe_used_connections(settings: FlowSettings) -> Finding:
    callers = describe_callers(parse_port(settings.database_url.get_secret_value()))
    return Finding(
        RECORDS_SUBJECT,
        fault=f"all connections of PostgreSQL are in use: {callers}",
        fix="end the programs that hold them; services go on with theirs",
    )


def make_server_probes(context: Context, facts: PlatformFacts | None) -> list[Probe]:
    """Make the probes of all servers but PostgreSQL; without facts, only those that need no records."""
    settings = context.settings

    def make_probe(server: str, subject: str, check: Callable[[], list[Finding]]) -> Probe:
        return Probe(server, subject, check=check, last_success=find_last_success(settings.home, server, facts))

    probes = [
        make_probe("portal", PORTAL_SUBJECT, lambda: probe_portal(settings)),
        make_probe("s3", OBJECT_SUBJECT, lambda: probe_objects(settings)),
        make_probe("prefect", FLOW_RUN_SUBJECT, lambda: probe_flow_runs(settings)),
    ]
    if facts is not None:
        probes += [
            make_probe("model-server", MODEL_SUBJECT, lambda: probe_model(settings, facts)),
            make_probe("mlflow", ALIAS_SUBJECT, lambda: probe_registry(context, facts)),
            make_probe("prefect", RUNNING_ROUND_SUBJECT, lambda: probe_running_round(settings, facts)),
            make_probe("prefect", REPRODUCTION_SUBJECT, lambda: probe_last_reproduction(settings, facts)),
        ]
    return probes


def find_last_success(home: Path, server: str, facts: PlatformFacts | None) -> LastSuccess:
    """Return the last known success of a server, from the records, the dispatcher's duties or the keeper.

    The keeper's time is the start of readiness; the server may have answered at any time after that.
    """
    ready_at = read_service_states(home).get(server, ServiceState()).ready_at
    ready = LastSuccess(convert_timestamp(ready_at), or_later=True) if ready_at else LastSuccess()

    duty = read_duty_statuses(get_duty_status_file(home)).get(DUTY_BY_SERVER.get(server, ""), DutyStatus())
    times = [get_last_success(duty)]
    if facts is not None and server in ("portal", "model-server"):
        times.append(facts.last_answer)
    if facts is not None and server in ("portal", "s3"):
        times.append(facts.last_upload)
    last_recorded = max((time for time in times if time), default=None)

    if last_recorded is None or (ready.at is not None and ready.at > last_recorded):
        return ready
    return LastSuccess(last_recorded)


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
    response = httpx.post(
        f"{settings.model_server_url}/v1/completions", json=body, headers=headers, timeout=PROBE_TIMEOUT_S
    )
    if response.status_code == 503 and "Retry-After" in response.headers:
        # Starting, or without a device; the duty that shares devices reports what is wrong with them.
        return [Finding(f"{MODEL_SUBJECT}: {parse_error_message(response)}", succeeded_at=facts.last_answer)]
    if not response.is_success:
        fault = f"v{facts.champion}, the champion, gives no answer: the model server says {response.status_code}"
        return [Finding(MODEL_SUBJECT, succeeded_at=facts.last_answer, fault=fault, fix=fix)]
    served = response.json()["model"]
    if served != format_model_name(facts.champion) and compute_age_s(facts.promoted_at) > PROMOTION_SETTLE_S:
        fault = f"{served} answers, and the champion is v{facts.champion}"
        alias_fix = f"see that the alias follows; else {fix}"
        return [Finding(MODEL_SUBJECT, succeeded_at=facts.last_answer, fault=fault, fix=alias_fix)]
    return [Finding(MODEL_SUBJECT, succeeded_at=get_utc_now())]


def probe_registry(context: Context, facts: PlatformFacts) -> list[Finding]:
    """Check that the registry has the champion and its predecessor, and that the alias points at the champion."""
    with context.tracker.use_short_timeout():
        aliases = context.tracker.read_aliases()
        lost_versions = [version for version in facts.lineage if not context.tracker.has_version(version)]
        missing_files = {
            version: context.tracker.find_missing_files(version, facts.files[version])
            for version in facts.lineage
            if version not in lost_versions
        }
    duty_statuses = read_duty_statuses(get_duty_status_file(context.settings.home))
    alias_set_at = get_last_success(duty_statuses.get(Duty.UPDATE_ALIASES, DutyStatus()))

    findings = [_describe_lost_version(context, facts, version, alias_set_at) for version in lost_versions]
    for version, names in missing_files.items():
        if names:
            fault = f"v{version} is in the registry and its files are not in the store: {', '.join(names[:5])}"
            fix = describe_registration(context.settings.home, version, *get_origin(facts, version))
            subject = f"the files of v{version}"
            findings.append(Finding(subject, succeeded_at=facts.promoted_at, fault=fault, fix=fix))

    if facts.champion is None:
        return [*findings, Finding(ALIAS_SUBJECT)]
    is_settled = compute_age_s(facts.promoted_at) > PROMOTION_SETTLE_S or alias_set_at is None
    if aliases.get("champion") == facts.champion or not is_settled:
        return [*findings, Finding(ALIAS_SUBJECT, succeeded_at=alias_set_at or get_utc_now())]
    alias_target = f"v{aliases['champion']}" if "champion" in aliases else "no version"
    is_lost = facts.champion in lost_versions
    alias_fault = Finding(
        ALIAS_SUBJECT,
        succeeded_at=alias_set_at,
        fault=f"the alias champion points at {alias_target}, and the champion is v{facts.champion}",
        fix="register the version again, as said above" if is_lost else "see `cotrain logs dispatcher`",
    )
    return [*findings, alias_fault]


def _describe_lost_version(
    context: Context, facts: PlatformFacts, version: int, alias_set_at: datetime | None
) -> Finding:
    is_champion = version == facts.champion
    name = f"v{version}, the champion," if is_champion else f"v{version}, the version before,"
    return Finding(
        f"v{version} in the registry",
        # The champion existed when its alias was last set; of its predecessor only the promotion time is known.
        succeeded_at=alias_set_at if is_champion else facts.promoted_at,
        fault=f"{name} is missing from the registry",
        fix=describe_registration(context.settings.home, version, *get_origin(facts, version)),
    )


def get_origin(facts: PlatformFacts, version: int) -> tuple[str | None, WeightsProvenance | None]:
    """Return the training run of a version, and the provenance of one of weights from elsewhere."""
    return facts.lineage[version], facts.provenances.get(version)


def check_waiting_reports(facts: PlatformFacts) -> Finding:
    """Check that no report waits longer than REPORTS_LATE_AFTER_S."""
    oldest = facts.oldest_report
    if facts.champion is None or oldest is None or compute_age_s(oldest) < REPORTS_LATE_AFTER_S:
        return Finding(REPORTS_SUBJECT, succeeded_at=facts.last_reproduction)
    return Finding(
        REPORTS_SUBJECT,
        succeeded_at=facts.last_reproduction,
        fault=f"{facts.num_reports_waiting} reports wait to be reproduced, the oldest since {oldest:%F %T}",
        fix=f"see `cotrain logs flows` and the flow {REPRODUCE_FLOW} in Prefect",
        never_succeeded=facts.last_reproduction is None,
    )


def check_waiting_notices(facts: PlatformFacts) -> Finding:
    """Check that no notice waits longer than LATE_AFTER_S."""
    oldest = facts.oldest_notice
    is_late = oldest is not None and compute_age_s(oldest) > LATE_AFTER_S
    return Finding(
        NOTICES_SUBJECT,
        succeeded_at=facts.last_notice,
        fault=f"notices wait to be delivered since {oldest:%F %T}" if is_late else None,
        fix="see `cotrain logs dispatcher`" if is_late else "",
        never_succeeded=facts.last_notice is None,
    )


def check_masters(facts: PlatformFacts) -> list[Finding]:
    """Return a finding for the champion and the version before it if their masters are lost."""
    return [
        Finding(
            f"the masters of v{version}",
            succeeded_at=facts.promoted_at,
            fault=f"the fp32 masters of v{version} {reason}",
            fix="rounds start from the version's weights instead, unless their recipe has optimizer.state = parent",
        )
        for version, reason in facts.lost_masters.items()
    ]


def find_failing_duties(home: Path) -> list[Finding]:
    """Find the dispatcher's failing duties."""
    return [
        Finding(
            f"the dispatcher's duty: {name}",
            succeeded_at=get_last_success(status),
            fault=f"the dispatcher cannot {name}, since {convert_timestamp(status.failing_since):%F %T}, "
            f"{status.failures} times: {status.error}",
            fix=DUTY_FIXES.get(name, "see `cotrain logs dispatcher`"),
            never_succeeded=status.succeeded_at is None,
        )
        for name, status in read_duty_statuses(get_duty_status_file(home)).items()
        if status.failing_since is not None
    ]


def get_last_success(status: DutyStatus) -> datetime | None:
    """Return the time of a duty's last success."""
    return None if status.succeeded_at is None else convert_timestamp(status.succeeded_at)
