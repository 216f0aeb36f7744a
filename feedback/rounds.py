"""Rounds: one at a time, each a row that remembers how far it is."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from feedback.accounts import Conflict, NotFound, audit
from feedback.contracts import Event, RoundOut, RoundParameters
from feedback.promotion import find_champion
from feedback.tables import AuditEvent, Case, CaseResult, ModelVersion, Plan, Round, TrainingRun
from infra.error_text import SafeMessageError

NOTIFY_CHANNEL = "cotrain"
MAX_VERSION_NUMBER = 2**31 - 1  # of an integer column
REGISTRATIONS_LOCK = 7_310_212  # any number that no other lock here has
STEP_BEGUN_ACTION = "step begun"
ROUND_STEPS = ("collect", "snapshot", "plan", "train", "evaluate", "decide", "done")


def request_round(session: Session, actor: str, parameters: RoundParameters, round_id: str) -> Round:
    """Start a round; the dispatcher, woken by this transaction's commit, runs its flow.

    Raises:
        Conflict: if a round is running.
    """
    number = (session.scalar(select(func.max(Round.number))) or 0) + 1
    turn = Round(
        id=round_id,
        number=number,
        requested_by=actor,
        parameters=parameters.model_dump(),
        parent_version=find_champion(session),
    )
    try:
        with session.begin_nested():
            session.add(turn)
    except IntegrityError:
        running = find_running_round(session)
        name = f"round {running.number}" if running else "another round"
        raise Conflict(f"{name} is running; wait for it or cancel it with `cotrain round cancel`") from None
    audit(session, actor, "round requested", turn.id)
    notify_dispatcher(session)
    session.refresh(turn)
    return turn


def notify_dispatcher(session: Session) -> None:
    """Wake the dispatcher when this transaction commits."""
    session.execute(text(f"notify {NOTIFY_CHANNEL}"))


def find_running_round(session: Session) -> Round | None:
    return session.scalar(select(Round).where(Round.state == "running"))


def find_newest_round(session: Session) -> Round | None:
    return session.scalars(select(Round).order_by(Round.number.desc()).limit(1)).first()


def find_round(session: Session, round_id: str) -> Round:
    """A round by id, or the newest by `latest`.

    Raises:
        NotFound: if there is none.
    """
    turn = find_newest_round(session) if round_id == "latest" else session.get(Round, round_id)
    if turn is None:
        raise NotFound(f"there is no round {round_id}")
    return turn


class RoundOwnershipLost(Exception):
    """The round has ended, or a later attempt works on it; whoever meets this leaves."""


def check_attempt(turn: Round, attempt: int) -> None:
    """Keep out an attempt that was taken for dead and is not: the newest one owns the round.

    Raises:
        RoundEnded: if the round is not running, or not this attempt's.
    """
    if turn.state != "running":
        raise RoundOwnershipLost(f"the round is {turn.state}")
    if turn.attempt != attempt:
        raise RoundOwnershipLost(f"attempt {turn.attempt} has taken over from attempt {attempt}")


def begin_step(session: Session, round_id: str, step: str, attempt: int) -> bool:
    """Note that an attempt begins a step; false when the round is past it, so that a rerun passes it by.

    Raises:
        RoundEnded: if the round is not running, or not this attempt's.
    """
    turn = session.get_one(Round, round_id, with_for_update=True)
    check_attempt(turn, attempt)
    if ROUND_STEPS.index(turn.step) > ROUND_STEPS.index(step):
        return False
    turn.step = step
    audit(session, "round", STEP_BEGUN_ACTION, round_id, step=step)
    return True


def increment_attempt(session: Session, round_id: str) -> int:
    """Count one more start of the round's flow."""
    turn = session.get_one(Round, round_id, with_for_update=True)
    turn.attempt += 1
    return turn.attempt


def finish_round(session: Session, round_id: str, state: str, reason: str, actor: str = "round") -> None:
    """End a running round; ending it twice changes nothing."""
    turn = session.get_one(Round, round_id, with_for_update=True)
    if turn.state == "running":
        turn.state, turn.reason, turn.step = state, reason, "done" if state == "promoted" else turn.step
        turn.finished_at = datetime.now(timezone.utc)
        audit(session, actor, f"round {state}", round_id, reason=reason)


def record_failed_items(session: Session, round_id: str, counts: Mapping[str, int]) -> None:
    """Keep how many items failed alone in steps of a round; a step that runs again counts anew."""
    turn = session.get_one(Round, round_id, with_for_update=True)
    turn.failed_items = {**turn.failed_items, **counts}


def get_or_store_plan(session: Session, round_id: str, body: dict[str, Any]) -> dict[str, Any]:
    """Store the round's plan, or return the one it has."""
    plan = session.scalar(select(Plan).where(Plan.round_id == round_id))
    if plan is None:
        plan = Plan(round_id=round_id, body=body)
        session.add(plan)
    return plan.body


def replace_plan(session: Session, round_id: str, body: dict[str, Any]) -> None:
    """Store the plan with which a round's run goes on, since its pool has changed."""
    plan = session.scalars(select(Plan).where(Plan.round_id == round_id)).one()
    audit(session, "supervisor", "re-planned", round_id, stages=[stage["layers"] for stage in body["stages"]])
    plan.body = body


def make_plan_picture_key(run_id: str) -> str:
    """Where the object store keeps the drawing of a run's plan."""
    return f"plans/{run_id}.svg"


def find_planned_run(session: Session, number: int) -> str | None:
    """The training run of a round that has a plan; None if there is no such round, or no plan yet."""
    query = select(TrainingRun.id).join(Plan, Plan.round_id == TrainingRun.round_id).join(Round)
    return session.scalar(query.where(Round.number == number))


def get_or_create_training_run(session: Session, round_id: str) -> TrainingRun:
    """The round's training run, made at the first call."""
    run = session.scalar(select(TrainingRun).where(TrainingRun.round_id == round_id))
    if run is None:
        run = TrainingRun(round_id=round_id)
        session.add(run)
        session.flush()
    return run


def add_version(session: Session, round_id: str, version: int, manifest: dict[str, Any]) -> None:
    """Record the candidate that the tracker registered under this number."""
    if session.get(ModelVersion, version) is None:
        run = get_or_create_training_run(session, round_id)
        session.add(ModelVersion(version=version, round_id=round_id, run_id=run.id, manifest=manifest))
    session.get_one(Round, round_id).candidate_version = version


def find_version_of_run(session: Session, run_id: str) -> ModelVersion | None:
    """The version that a training run became; None if it has not been registered."""
    return session.scalar(select(ModelVersion).where(ModelVersion.run_id == run_id))


def lock_registrations(session: Session) -> None:
    """Let no other transaction register a lost version until this one ends, or there would be several of it."""
    session.execute(select(func.pg_advisory_xact_lock(REGISTRATIONS_LOCK)))


class VersionNotRegistered(SafeMessageError, ValueError):
    """There is no version of this number, and there never was."""


def find_version(session: Session, version: int) -> ModelVersion:
    """Find the record of a version.

    Raises:
        NeverRegistered: if there is none.
    """
    found = session.get(ModelVersion, version) if version <= MAX_VERSION_NUMBER else None
    if found is None:
        raise VersionNotRegistered(f"v{version} was never registered here; `cotrain round status` names the newest")
    return found


def identify_version(session: Session, manifest: dict[str, Any], wanted: int | None, run_id: str) -> ModelVersion:
    """The version that a model folder is a copy of: the one wanted, that of the run, or the one with this manifest.

    Raises:
        ValueError: if no version was recorded so, or several were.
    """
    if wanted is not None:
        return find_version(session, wanted)
    own = find_version_of_run(session, run_id)
    if own is not None:
        return own
    same = session.scalars(select(ModelVersion).where(ModelVersion.manifest == manifest)).all()
    if len(same) != 1:
        names = ", ".join(f"v{one.version}" for one in same) or "no version"
        raise ValueError(f"{names} has this folder's manifest; say which version it is with --version")
    return same[0]


def find_untested_cases(session: Session, version: int) -> Sequence[Case]:
    """Cases the version has not taken yet."""
    taken = select(CaseResult.case_id).where(CaseResult.version == version)
    query = select(Case).where(Case.withdrawn_at.is_(None), Case.id.not_in(taken))
    return session.scalars(query.order_by(Case.id)).all()


STEP_ACTIVITIES = {
    "collect": "collecting",
    "snapshot": "freezing its mixture",
    "plan": "planning",
    "train": "training",
    "evaluate": "evaluating",
    "decide": "deciding",
}


def describe_round_end(turn: Round) -> str | None:
    """What anybody may know of how a round ended, in a sentence; `reason` is for operators."""
    if turn.state == "failed":
        return f"failed while {STEP_ACTIVITIES.get(turn.step, turn.step)}; operators see why"
    if turn.state == "rejected":
        broken = len((turn.decision or {}).get("regressions", ()))
        return "did not pass the gate" + (f": {broken} reports that passed before fail again" if broken else "")
    return {"promoted": f"v{turn.candidate_version} is the champion", "cancelled": "cancelled"}.get(turn.state)


def describe_round(session: Session, turn: Round) -> RoundOut:
    """Compose a round's public record."""
    run = session.scalar(select(TrainingRun).where(TrainingRun.round_id == turn.id))
    return RoundOut(
        id=turn.id,
        number=turn.number,
        state=turn.state,
        step=turn.step,
        reason=turn.reason,
        parent_version=turn.parent_version,
        candidate_version=turn.candidate_version,
        snapshot_id=turn.snapshot_id,
        decision=turn.decision,
        failed_items=turn.failed_items,
        status=run.status if run else None,
        created_at=turn.created_at,
        finished_at=turn.finished_at,
        timeline=_read_timeline(session, turn),
    )


def _read_timeline(session: Session, turn: Round) -> list[Event]:
    """When each step began; one that began again after a kill appears again."""
    query = select(AuditEvent).where(AuditEvent.subject == turn.id, AuditEvent.action == STEP_BEGUN_ACTION)
    return [
        Event(at=event.created_at, text=str(event.detail["step"]))
        for event in session.scalars(query.order_by(AuditEvent.id))
    ]
