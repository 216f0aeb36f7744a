"""Training states: the checkpoints in the object store that later rounds may start from, and how long they are kept.

The state of a run is the checkpoint whose weights are the run's version: its fp32 master weights and, after runs that a
`continue` round may go on from, both moments of the optimizer. It is kept until two promotions later: for the champion
and the version before it. A run whose round ended without a promotion keeps nothing.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.accounts import audit
from feedback.states import RoundState
from feedback.tables import (
    ModelVersion,
    Promotion,
    Round,
    TrainingRun,
    TrainingState,
    read_transaction_time,
    transaction_time,
)

NUM_KEPT_PROMOTIONS = 2
ENDED_ROUND_STATES = (RoundState.PROMOTED, RoundState.REJECTED, RoundState.FAILED, RoundState.CANCELLED)
MAX_END_REASON_CHARACTERS = 500
CLEAR_AFTER = timedelta(hours=1)
# Why nothing is kept, as it follows the word "masters".
SUPERSEDED_REASON = "were deleted after two promotions"
NOT_PROMOTED_REASON = "were deleted, since its round ended without a promotion"
NEVER_STORED_REASON = "were never stored"


@dataclass(frozen=True, kw_only=True)
class KeptCheckpoint:
    """A checkpoint in the object store that is kept.

    Attributes:
        manifest_sha256: of its manifest, which has the sha256 of every file.
        num_bytes: of the files that are kept.
        has_moments: the files of the optimizer's moments are kept too.
    """

    step: int
    manifest_sha256: str
    num_bytes: int
    has_moments: bool


def record_training_state(session: Session, run_id: str, kept: KeptCheckpoint) -> None:
    """Record the state of a run; a state that is recorded, or has ended, is not changed."""
    if session.get(TrainingState, run_id) is None:
        session.add(
            TrainingState(
                run_id=run_id,
                step=kept.step,
                manifest_sha256=kept.manifest_sha256,
                num_bytes=kept.num_bytes,
                has_moments=kept.has_moments,
            )
        )


def find_training_state(session: Session, version: int) -> TrainingState | None:
    """Return the record of the state of a version's run, whether it is kept or has ended; None: there never was one."""
    query = select(TrainingState).join(ModelVersion, ModelVersion.run_id == TrainingState.run_id)
    return session.scalar(query.where(ModelVersion.version == version))


def find_lost_masters(session: Session, versions: Collection[int]) -> dict[int, str]:
    """Return why the state of a version has ended, by version, of those that the policy did not end."""
    query = (
        select(ModelVersion.version, TrainingState.end_reason)
        .join(TrainingState, TrainingState.run_id == ModelVersion.run_id)
        .where(ModelVersion.version.in_(versions), TrainingState.ended_at.is_not(None))
    )
    return {
        version: reason
        for version, reason in session.execute(query).tuples()
        if reason is not None and reason not in (SUPERSEDED_REASON, NOT_PROMOTED_REASON)
    }


def end_training_state(session: Session, run_id: str, reason: str, actor: str) -> None:
    """Record that the state of a run is kept no longer; do nothing if that is recorded already.

    No round starts from it after the commit, so its objects can be deleted then.
    """
    state = session.get(TrainingState, run_id, with_for_update=True)
    if state is None:
        state = TrainingState(run_id=run_id)
        session.add(state)
    if state.ended_at is None:
        state.ended_at, state.end_reason = transaction_time(), reason[:MAX_END_REASON_CHARACTERS]
        state.cleared_at = None
        audit(session, actor, "training state ended", run_id, reason=state.end_reason)


def find_needed_versions(session: Session) -> set[int]:
    """Return the versions whose state is kept: of the last promotions, and the parents of running rounds."""
    promoted = select(Promotion.version).order_by(Promotion.id.desc()).limit(NUM_KEPT_PROMOTIONS)
    parents = select(Round.parent_version).where(Round.state.not_in(ENDED_ROUND_STATES))
    return {version for query in (promoted, parents) for version in session.scalars(query) if version is not None}


def end_unneeded_states(session: Session, actor: str) -> int:
    """End the states of ended rounds that no later round starts from; return their number."""
    needed = find_needed_versions(session)
    query = (
        select(TrainingRun.id, ModelVersion.version, Promotion.version)
        .join(Round, Round.id == TrainingRun.round_id)
        .outerjoin(ModelVersion, ModelVersion.run_id == TrainingRun.id)
        .outerjoin(Promotion, Promotion.round_id == Round.id)
        .outerjoin(TrainingState, TrainingState.run_id == TrainingRun.id)
        .where(Round.state.in_(ENDED_ROUND_STATES), TrainingState.ended_at.is_(None))
    )
    unneeded = [row for row in session.execute(query).all() if row[1] is None or row[1] not in needed]
    for run_id, _, promoted in unneeded:
        end_training_state(session, run_id, NOT_PROMOTED_REASON if promoted is None else SUPERSEDED_REASON, actor)
    return len(unneeded)


def list_unrecorded_runs(session: Session) -> Sequence[tuple[str, int]]:
    """Return run and step of needed versions without a record, which version 0.3 or older registered."""
    query = (
        select(ModelVersion)
        .outerjoin(TrainingState, TrainingState.run_id == ModelVersion.run_id)
        .where(ModelVersion.version.in_(find_needed_versions(session)), TrainingState.run_id.is_(None))
    )
    steps = [(version.run_id, version.manifest.get("step")) for version in session.scalars(query)]
    return [(run_id, step) for run_id, step in steps if run_id is not None and isinstance(step, int)]


def list_uncleared_states(session: Session) -> Sequence[TrainingState]:
    """Return the states of ended rounds of whose runs the store may have more than is kept."""
    query = (
        select(TrainingState)
        .join(TrainingRun, TrainingRun.id == TrainingState.run_id)
        .join(Round, Round.id == TrainingRun.round_id)
        .where(TrainingState.cleared_at.is_(None), Round.state.in_(ENDED_ROUND_STATES))
    )
    return session.scalars(query).all()


def record_deletion(session: Session, state: TrainingState, num_deleted: int, actor: str) -> None:
    """Record that objects of a run's checkpoints were deleted."""
    kept = state.end_reason is None
    audit(session, actor, "checkpoints deleted", state.run_id, objects=num_deleted, kept=kept)


def mark_cleared(session: Session, state: TrainingState) -> None:
    """Record that the store has nothing of a run but what is kept.

    Nothing is recorded within CLEAR_AFTER of the round's end, since an upload that was in progress may still add
    objects, nor if the state has ended meanwhile.
    """
    ended = select(Round.finished_at).join(TrainingRun, TrainingRun.round_id == Round.id)
    finished_at = session.scalar(ended.where(TrainingRun.id == state.run_id))
    if finished_at is not None and read_transaction_time(session) - finished_at < CLEAR_AFTER:
        return
    stored = session.get_one(TrainingState, state.run_id, with_for_update=True)
    if stored.ended_at == state.ended_at:
        stored.cleared_at = transaction_time()
