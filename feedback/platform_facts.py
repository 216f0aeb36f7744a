"""Facts about the platform's health, read from the database: last successes and the oldest waiting records."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from feedback import reports, rounds, training_states
from feedback.contracts import WeightsProvenance
from feedback.states import ReportState
from feedback.tables import AuditEvent, Dataset, ModelVersion, Outbox, Promotion, Response, Round
from yuan.model.model_manifest import MODEL_MANIFEST_FILE

REVIEW_OUTCOMES = (ReportState.ACCEPTED, ReportState.REJECTED, ReportState.DISPUTED)


@dataclass(frozen=True)
class PlatformFacts:
    """The database facts that `cotrain doctor` checks; a time is None if the event has never happened.

    Attributes:
        champion: the version in service; None before the first promotion.
        lineage: training run id by version, for the champion and its predecessor; None for weights from elsewhere.
        provenances: where such weights come from, by version.
        lost_masters: why the masters of one of them are not kept, by version, unless the policy ended them.
        files: names of the files of their model folders, by version.
        running: the running round; None if no round is running.
        num_reports_waiting: number of reports that wait for screening or reproduction, or for review between rounds.
        oldest_report: when the oldest of them was received.
        oldest_notice: when the oldest notice that is not delivered was written.
    """

    champion: int | None
    promoted_at: datetime | None
    lineage: dict[int, str | None]
    provenances: dict[int, WeightsProvenance]
    lost_masters: dict[int, str]
    files: dict[int, list[str]]
    running: Round | None
    num_reports_waiting: int
    oldest_report: datetime | None
    oldest_notice: datetime | None
    last_answer: datetime | None
    last_reproduction: datetime | None
    last_notice: datetime | None
    last_upload: datetime | None


def read_platform_facts(session: Session) -> PlatformFacts:
    """Read the facts, each from the newest or oldest row of its kind."""
    newest = session.scalars(select(Promotion).order_by(Promotion.id.desc()).limit(1)).first()
    versions = [version for version in (newest.version, newest.previous) if version] if newest else []
    lineage = session.scalars(select(ModelVersion).where(ModelVersion.version.in_(versions))).all()
    running = rounds.find_running_round(session)
    pending = reports.count_pending_reports(session, with_review=running is None)
    oldest_notice = select(func.min(Outbox.created_at)).where(Outbox.delivered_at.is_(None))
    num_decided = sum(
        (AuditEvent.detail[name].as_integer() for name in REVIEW_OUTCOMES[1:]),
        AuditEvent.detail[REVIEW_OUTCOMES[0]].as_integer(),
    )
    last_review = select(func.max(AuditEvent.created_at)).where(AuditEvent.action == "reviewed", num_decided > 0)

    def last(moment: ColumnElement[datetime]) -> datetime | None:
        return session.scalar(select(func.max(moment)))

    return PlatformFacts(
        champion=newest.version if newest else None,
        promoted_at=newest.created_at if newest else None,
        lineage={version.version: version.run_id for version in lineage},
        lost_masters=training_states.find_lost_masters(session, versions),
        provenances={
            version.version: WeightsProvenance.model_validate(version.provenance)
            for version in lineage
            if version.provenance is not None
        },
        files={version.version: [MODEL_MANIFEST_FILE, *version.manifest.get("files", ())] for version in lineage},
        running=running,
        num_reports_waiting=pending.count,
        oldest_report=pending.oldest_at,
        oldest_notice=session.scalar(oldest_notice),
        last_answer=last(Response.created_at),  # type: ignore[arg-type]
        last_reproduction=session.scalar(last_review),
        last_notice=last(Outbox.delivered_at),  # type: ignore[arg-type]
        last_upload=last(Dataset.created_at),  # type: ignore[arg-type]
    )
