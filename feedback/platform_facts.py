"""What the records tell of how the platform does: last successes, and what waits for longer than it should."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from feedback import reports, rounds
from feedback.tables import AuditEvent, Dataset, ModelVersion, Outbox, Promotion, Response, Round

REVIEW_OUTCOMES = ("accepted", "rejected", "disputed")


@dataclass(frozen=True)
class PlatformFacts:
    """What `doctor` asks the database for; moments are None for what has never happened."""

    champion: int | None
    promoted_at: datetime | None
    lineage: dict[int, str]  # run by version, of the champion and the one before
    files: dict[int, list[str]]  # of their model folders, by version
    running: Round | None
    num_reports_waiting: int
    oldest_report: datetime | None
    oldest_notice: datetime | None
    last_answer: datetime | None
    last_reproduction: datetime | None
    last_notice: datetime | None
    last_upload: datetime | None


def read_platform_facts(session: Session) -> PlatformFacts:
    """Read the facts, each from the newest row of its kind."""
    newest = session.scalars(select(Promotion).order_by(Promotion.id.desc()).limit(1)).first()
    versions = [version for version in (newest.version, newest.previous) if version] if newest else []
    lineage = session.scalars(select(ModelVersion).where(ModelVersion.version.in_(versions))).all()
    running = rounds.find_running_round(session)
    count, oldest = reports.count_pending_reports(session, with_review=running is None)
    waiting = select(func.min(Outbox.created_at)).where(Outbox.delivered_at.is_(None))
    decided = sum(
        (AuditEvent.detail[name].as_integer() for name in REVIEW_OUTCOMES[1:]),
        AuditEvent.detail[REVIEW_OUTCOMES[0]].as_integer(),
    )
    reviewed = select(func.max(AuditEvent.created_at)).where(AuditEvent.action == "reviewed", decided > 0)

    def last(moment: ColumnElement[datetime]) -> datetime | None:
        return session.scalar(select(func.max(moment)))

    return PlatformFacts(
        champion=newest.version if newest else None,
        promoted_at=newest.created_at if newest else None,
        lineage={one.version: one.run_id for one in lineage},
        files={one.version: ["manifest.json", *one.manifest.get("files", ())] for one in lineage},
        running=running,
        num_reports_waiting=count,
        oldest_report=oldest,
        oldest_notice=session.scalar(waiting),
        last_answer=last(Response.created_at),  # type: ignore[arg-type]
        last_reproduction=session.scalar(reviewed),
        last_notice=last(Outbox.delivered_at),  # type: ignore[arg-type]
        last_upload=last(Dataset.created_at),  # type: ignore[arg-type]
    )
