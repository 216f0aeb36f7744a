"""Remove what the retention policy keeps no longer: after a round, however it ended, and by `cotrain cleanup`.

Each area is cleaned on its own. The dispatcher removes stored checkpoints: `flows.dispatcher.checkpoint_cleanup`.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from feedback import rounds
from feedback.accounts import audit
from feedback.retention import record_cleanup
from flows.cleanup_record import write_cleanup_record
from flows.context import Context, require_server
from flows.disk_history import record_disk_usage
from flows.retention_policy import RETENTION_FILE, RetentionPolicy, read_retention_policy
from flows.round.removals import CLEANUP_AREAS, CleanupArea, Removal, Server
from infra.error_text import describe_error
from infra.process_group import hold_file_lock

log = logging.getLogger(__name__)

CLEANUP_LOCK_FILE = ".cleanup.lock"  # below the runs


@dataclass
class CleanupReport:
    """Removals of a cleanup, done or only listed, and its failures.

    Attributes:
        problems: why files of an area stay, by the area.
    """

    removals: list[Removal] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(removal.num_bytes for removal in self.removals)

    def to_rows(self) -> list[dict[str, str | int]]:
        """Return the rows of the table that Prefect shows."""
        rows = [removal.to_row() for removal in self.removals]
        for area, problem in self.problems.items():
            rows.append({"subject": area, "files": f"not removed: {problem}"})
        return rows


def clean_up_after_round(context: Context, round_id: str) -> list[dict[str, str | int]]:
    """Remove expired files and record the disk's usage; return the rows of a table. No error fails the round."""
    report = CleanupReport()
    try:
        report = remove_expired(context, "round")
    except Exception as error:  # of any kind: the round has its outcome, and the next one cleans up again
        report.problems["every area"] = describe_error(error)
        log.warning("expired files were not removed: %s", describe_error(error))
    with context.sessions() as session:
        number = rounds.find_round(session, round_id).number
    try:
        record_disk_usage(context.settings.home, number)
    except OSError as error:
        log.warning("the disk's usage was not recorded: %s", error)
    return report.to_rows()


def clean_up(context: Context) -> CleanupReport:
    """Remove expired files in a flow of its own, after a round whose flow has not."""
    return remove_expired(context, "dispatcher")


def list_expired(context: Context, policy: RetentionPolicy | None = None) -> CleanupReport:
    """List what the policy of the home folder keeps no longer, with its size; remove nothing.

    Raises:
        ValueError: if the policy cannot be read.
    """
    policy = policy or read_retention_policy(context.settings.home)
    report = CleanupReport()
    for area in _iterate_reachable_areas(context, report):
        report.removals += _list_area(context, policy, area, report)
    return report


def remove_expired(context: Context, actor: str, policy: RetentionPolicy | None = None) -> CleanupReport:
    """Remove what the policy of the home folder keeps no longer, audit each removal, and record the outcome.

    What fails is logged, recorded for `cotrain doctor`, and tried again the next time.
    """
    report = CleanupReport()
    context.runs.mkdir(parents=True, exist_ok=True)
    with hold_file_lock(context.runs / CLEANUP_LOCK_FILE):
        try:
            policy = policy or read_retention_policy(context.settings.home)
        except ValueError as error:
            report.problems[RETENTION_FILE] = str(error)
        else:
            for area in _iterate_reachable_areas(context, report):
                for removal in _list_area(context, policy, area, report):
                    _remove(context, area, removal, actor, report)
        for name, problem in report.problems.items():
            log.warning("cleanup: %s: %s", name, problem)
        write_cleanup_record(context.settings.home, report.problems)
        if not report.problems:
            with context.sessions.begin() as session:
                record_cleanup(session, actor)
    return report


def _iterate_reachable_areas(context: Context, report: CleanupReport) -> Iterator[CleanupArea]:
    """Yield the areas whose servers answer; each server is asked once."""
    problems: dict[Server, str | None] = {}
    for area in CLEANUP_AREAS:
        for server in area.needs:
            if server not in problems:
                problems[server] = _find_server_problem(context, server)
        failures = [problem for server in area.needs if (problem := problems[server]) is not None]
        if failures:
            report.problems[area.name] = failures[0]
        else:
            yield area


def _find_server_problem(context: Context, server: Server) -> str | None:
    settings = context.settings
    url = f"{settings.mlflow_url}/health" if server == "MLflow" else settings.s3_endpoint
    try:
        require_server(server, url, "COTRAIN_MLFLOW_URL" if server == "MLflow" else "COTRAIN_S3_ENDPOINT")
    except ValueError as error:
        return str(error)
    return None


def _list_area(context: Context, policy: RetentionPolicy, area: CleanupArea, report: CleanupReport) -> list[Removal]:
    removals: list[Removal] = []
    try:
        removals.extend(area.list_removals(context, policy))
    except Exception as error:  # of one area: the others continue, and what was listed before it is removed
        report.problems[area.name] = describe_error(error)
    return removals


def _remove(context: Context, area: CleanupArea, removal: Removal, actor: str, report: CleanupReport) -> None:
    try:
        num_bytes = removal.remove()
    except Exception as error:  # of one removal: the others continue
        problem = f"{removal.files} of {removal.subject}: {describe_error(error)}"
        report.problems.setdefault(area.name, problem)
        return
    if num_bytes == 0:  # in use meanwhile
        return
    removed = removal if num_bytes is None else replace(removal, num_bytes=num_bytes)
    with context.sessions.begin() as session:
        audit(session, actor, "removed", removed.subject, files=removed.files, bytes=removed.num_bytes)
    log.info("removed %s of %s, %d bytes", removed.files, removed.subject, removed.num_bytes)
    report.removals.append(removed)
