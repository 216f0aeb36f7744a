"""Records whose files may be removed: old runs, and versions that never were champion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from feedback.accounts import audit
from feedback.states import RoundState
from feedback.tables import AuditEvent, ModelVersion, Promotion, Round, TrainingRun

CLEANED_ACTION = "cleaned up"


@dataclass(frozen=True)
class ExpiredRecords:
    """Records whose files no round, lineage or alias needs.

    Attributes:
        runs: the version of each run, by the run's id; None if it has none.
        versions: the names of each version's files, by its number, without the manifest.
    """

    runs: Mapping[str, int | None]
    versions: Mapping[int, Sequence[str]]


def find_expired_records(session: Session, *, keep_rounds: int, keep_rounds_of_losers: int) -> ExpiredRecords:
    """Find the runs and versions that a policy keeps no longer.

    The champion, the version before it, the newest candidate, the parent of the running round, and their runs are
    never among them, nor is the running round's own run.

    Args:
        keep_rounds: newest ended rounds whose runs are kept.
        keep_rounds_of_losers: newest ended rounds whose versions are kept, champions or not.
    """
    needed = find_versions_in_use(session)
    ended_rounds = select(Round.id).where(Round.state != RoundState.RUNNING).order_by(Round.number.desc())
    runs = session.execute(
        select(TrainingRun.id, ModelVersion.version)
        .outerjoin(ModelVersion, ModelVersion.run_id == TrainingRun.id)
        .where(TrainingRun.round_id.in_(ended_rounds.offset(keep_rounds)))
        .order_by(TrainingRun.created_at)
    ).all()
    champions = select(Promotion.version)
    losers = session.scalars(
        select(ModelVersion)
        .where(ModelVersion.round_id.in_(ended_rounds.offset(keep_rounds_of_losers)))
        .where(ModelVersion.version.not_in(champions))
        .order_by(ModelVersion.version)
    ).all()
    return ExpiredRecords(
        runs={run_id: version for run_id, version in runs if version not in needed},
        versions={
            loser.version: list(loser.manifest.get("files", ())) for loser in losers if loser.version not in needed
        },
    )


def record_cleanup(session: Session, actor: str) -> None:
    """Record that everything which a policy keeps no longer is removed, after the newest round if it has ended."""
    newest = _find_newest_round(session)
    if newest is not None and newest.state != RoundState.RUNNING:
        audit(session, actor, CLEANED_ACTION, newest.id)


def find_uncleaned_round(session: Session) -> Round | None:
    """Return the newest round if it has ended and no complete cleanup is recorded after it."""
    newest = _find_newest_round(session)
    if newest is None or newest.state == RoundState.RUNNING:
        return None
    cleaned = exists().where(AuditEvent.subject == newest.id, AuditEvent.action == CLEANED_ACTION)
    return None if session.scalar(select(cleaned)) else newest


def _find_newest_round(session: Session) -> Round | None:
    return session.scalars(select(Round).order_by(Round.number.desc()).limit(1)).first()


def find_versions_in_use(session: Session) -> set[int]:
    """Return the champion, the version before it, the newest candidate, and the versions of running rounds."""
    newest = session.scalars(select(Promotion).order_by(Promotion.id.desc()).limit(1)).first()
    candidates = select(Round.candidate_version).where(Round.candidate_version.is_not(None))
    running = session.scalars(select(Round).where(Round.state == RoundState.RUNNING)).all()
    versions = {
        session.scalars(candidates.order_by(Round.number.desc()).limit(1)).first(),
        *((newest.version, newest.previous) if newest else ()),
        *(version for entry in running for version in (entry.parent_version, entry.candidate_version)),
    }
    return {version for version in versions if version is not None}
