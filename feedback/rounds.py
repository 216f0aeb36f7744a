"""Training rounds: at most one runs at a time; each is a row that stores its progress."""

import logging
from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from feedback.accounts import Conflict, NotFound, audit
from feedback.advisory_locks import AdvisoryLock, hold_advisory_lock
from feedback.contracts import Event, RepeatedVerdicts, RoundOut, RoundParameters
from feedback.promotion import find_champion
from feedback.promotion_decision import PromotionDecision
from feedback.round_steps import STEP_ACTIVITIES, ItemStep, RoundStep, get_item_step_name
from feedback.states import RoundState
from feedback.tables import AuditEvent, Case, CaseResult, JsonbObject, ModelVersion, Plan, Round, TrainingRun
from infra.error_text import SafeMessageError
from yuan.data.rule_text import describe_errors
from yuan.eval.conditions import EvaluationConditions
from yuan.model.model_manifest import ModelManifest
from yuan.plan.plan_record import PipelinePlan
from yuan.recipe import EvaluationSection, Recipe, validate_recipe

log = logging.getLogger(__name__)

NOTIFY_CHANNEL = "cotrain"
MAX_VERSION_NUMBER = 2**31 - 1  # the largest value of a PostgreSQL integer column
STEP_BEGUN_ACTION = "step begun"


def request_round(session: Session, actor: str, parameters: RoundParameters, round_id: str) -> Round:
    """Create a round; this transaction's commit wakes the dispatcher, which runs the round's flow.

    Raises:
        Conflict: if a round is running.
    """
    number = (session.scalar(select(func.max(Round.number))) or 0) + 1
    training_round = Round(
        id=round_id,
        number=number,
        requested_by=actor,
        parameters=parameters.model_dump(),
        parent_version=find_champion(session),
    )
    try:
        with session.begin_nested():
            session.add(training_round)
    except IntegrityError:
        running = find_running_round(session)
        name = f"round {running.number}" if running else "another round"
        raise Conflict(f"{name} is running; wait for it or cancel it with `cotrain round cancel`") from None
    audit(session, actor, "round requested", training_round.id)
    notify_dispatcher(session)
    session.refresh(training_round)
    return training_round


def notify_dispatcher(session: Session) -> None:
    """Wake the dispatcher when this transaction commits."""
    session.execute(text(f"notify {NOTIFY_CHANNEL}"))


def find_running_round(session: Session) -> Round | None:
    """Return the running round; None if no round is running."""
    return session.scalar(select(Round).where(Round.state == RoundState.RUNNING))


def find_newest_round(session: Session) -> Round | None:
    """Return the round with the highest number; None if there is no round."""
    return session.scalars(select(Round).order_by(Round.number.desc()).limit(1)).first()


def find_round(session: Session, round_id: str) -> Round:
    """Return the round with this id, or the newest round if the id is `latest`.

    Raises:
        NotFound: if there is none.
    """
    training_round = find_newest_round(session) if round_id == "latest" else session.get(Round, round_id)
    if training_round is None:
        raise NotFound(f"there is no round {round_id}; use the id that its start returned, or latest")
    return training_round


class RoundOwnershipLost(Exception):
    """The round has ended, or a later attempt owns it; the attempt that gets this error must exit."""


def check_attempt(training_round: Round, attempt: int) -> None:
    """Check that an attempt still owns the round.

    An attempt may be replaced while it is still running; only the newest attempt owns the round.

    Raises:
        RoundOwnershipLost: if the round is not running, or not this attempt's.
    """
    if training_round.state != RoundState.RUNNING:
        raise RoundOwnershipLost(f"the round is {training_round.state}")
    if training_round.attempt != attempt:
        raise RoundOwnershipLost(f"attempt {training_round.attempt} has taken over from attempt {attempt}")


def begin_step(session: Session, round_id: str, step: RoundStep, attempt: int) -> bool:
    """Record that an attempt begins a step; return False if the round is past the step, so that a rerun skips it.

    Raises:
        RoundOwnershipLost: if the round is not running, or not this attempt's.
    """
    training_round = session.get_one(Round, round_id, with_for_update=True)
    check_attempt(training_round, attempt)
    steps = list(RoundStep)
    if steps.index(RoundStep(training_round.step)) > steps.index(step):
        return False
    training_round.step = step
    training_round.activity = None
    audit(session, "round", STEP_BEGUN_ACTION, round_id, step=step)
    return True


def record_activity(session: Session, round_id: str, activity: str, attempt: int) -> None:
    """Record what the round's present step does, in one line.

    Raises:
        RoundOwnershipLost: if the round is not running, or not this attempt's.
    """
    training_round = session.get_one(Round, round_id)
    check_attempt(training_round, attempt)
    training_round.activity = activity


def record_token_counts(session: Session, round_id: str, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Record the counts of the windows that the round trains on, by part of its mixture."""
    session.get_one(Round, round_id).token_counts = {name: dict(values) for name, values in counts.items()}


def increment_attempt(session: Session, round_id: str) -> int:
    """Increment the number of starts of the round's flow and return it, as the new attempt's number."""
    training_round = session.get_one(Round, round_id, with_for_update=True)
    training_round.attempt += 1
    return training_round.attempt


def finish_round(session: Session, round_id: str, state: RoundState, reason: str, actor: str = "round") -> None:
    """Set the final state of a running round; do nothing if it has ended already."""
    training_round = session.get_one(Round, round_id, with_for_update=True)
    if training_round.state != RoundState.RUNNING:
        return
    training_round.state, training_round.reason = state, reason
    if state == RoundState.PROMOTED:
        training_round.step = RoundStep.DONE
    # Not the transaction's time: it may have begun before the round's last step, and waited for the lock.
    training_round.finished_at = func.clock_timestamp()
    audit(session, actor, f"round {state}", round_id, reason=reason)


def record_failed_items(session: Session, round_id: str, counts: Mapping[ItemStep, int]) -> None:
    """Store the number of failed items for each step of a round; a rerun of a step replaces its count."""
    training_round = session.get_one(Round, round_id, with_for_update=True)
    failed_items = dict(training_round.failed_items)
    for step, count in counts.items():
        failed_items[step] = count
    training_round.failed_items = failed_items


def get_or_store_plan(session: Session, round_id: str, plan: PipelinePlan) -> PipelinePlan:
    """Store the round's plan if it has none; return the stored plan.

    Raises:
        ValueError: if the stored plan is of another schema.
    """
    session.execute(insert(Plan).values(round_id=round_id, body=plan.to_json()).on_conflict_do_nothing())
    stored = session.scalars(select(Plan).where(Plan.round_id == round_id)).one()
    return PipelinePlan.from_json(stored.body)


def replace_plan(session: Session, round_id: str, plan: PipelinePlan) -> None:
    """Replace the plan of a round whose device pool has changed; the run resumes with the new plan."""
    stored = session.scalars(select(Plan).where(Plan.round_id == round_id)).one()
    audit(session, "supervisor", "re-planned", round_id, stages=[stage.layers for stage in plan.stages])
    stored.body = plan.to_json()


def make_plan_picture_key(run_id: str) -> str:
    """Return the object store key of the picture of a run's plan."""
    return f"plans/{run_id}.svg"


def find_planned_run(session: Session, number: int) -> str | None:
    """Return the training run id of a round, given by number; None if there is no such round, or it has no plan yet."""
    query = select(TrainingRun.id).join(Plan, Plan.round_id == TrainingRun.round_id).join(Round)
    return session.scalar(query.where(Round.number == number))


def get_or_create_training_run(session: Session, round_id: str) -> TrainingRun:
    """Return the round's training run; the first call creates it, and a concurrent one waits for its commit."""
    query = select(TrainingRun).where(TrainingRun.round_id == round_id)
    run = session.scalar(query)
    if run is None:
        session.execute(insert(TrainingRun).values(round_id=round_id).on_conflict_do_nothing())
        run = session.scalars(query).one()
    return run


def find_run_status(session: Session, run_id: str) -> JsonbObject | None:
    """Return the last reported status of a training run; None if there is none, or the id is not that of a run."""
    run = session.get(TrainingRun, run_id)
    return None if run is None else run.status


def add_version(session: Session, round_id: str, version: int, manifest: ModelManifest) -> None:
    """Record the round's candidate under the version number that the tracker registered for it."""
    if session.get(ModelVersion, version) is None:
        run = get_or_create_training_run(session, round_id)
        record = ModelVersion(version=version, round_id=round_id, run_id=run.id, manifest=manifest.to_json())
        session.add(record)
    session.get_one(Round, round_id).candidate_version = version


def find_version_of_run(session: Session, run_id: str) -> ModelVersion | None:
    """Return the model version that a training run produced; None if it has not been registered."""
    return session.scalar(select(ModelVersion).where(ModelVersion.run_id == run_id))


def lock_registrations(session: Session) -> None:
    """Block other transactions from registering a lost version until this one ends, so that it is registered once."""
    hold_advisory_lock(session, AdvisoryLock.REGISTRATIONS)


def get_or_store_recipe(session: Session, round_id: str, name: str, recipe: Recipe) -> tuple[str, Recipe]:
    """Store the round's recipe if it has none; return the name and the values that are stored."""
    training_round = session.get_one(Round, round_id, with_for_update=True)
    if training_round.recipe is None:
        training_round.recipe = {"name": name, "values": recipe.to_json()}
    return read_recipe(training_round)


def read_recipe(training_round: Round) -> tuple[str, Recipe]:
    """Return the name and the values of the recipe that a round began with.

    Raises:
        ValueError: if the round has none, or this release cannot read it.
    """
    stored = training_round.recipe
    if stored is None:
        raise ValueError(f"round {training_round.number} has no recipe yet; its flow stores one when it begins")
    return str(stored["name"]), validate_recipe(stored["values"], str(stored["name"]))


class VersionNotRegistered(SafeMessageError, ValueError):
    """No version was ever registered under this number."""


def find_version(session: Session, version: int) -> ModelVersion:
    """Return the record of a version.

    Raises:
        VersionNotRegistered: if there is none.
    """
    record = session.get(ModelVersion, version) if version <= MAX_VERSION_NUMBER else None
    if record is None:
        raise VersionNotRegistered(f"v{version} was never registered here; `cotrain round status` names the newest")
    return record


def identify_version(session: Session, manifest: ModelManifest, version: int | None, run_id: str) -> ModelVersion:
    """Return the version of which a model folder is a copy.

    Args:
        version: the version number, if the caller knows it.
        run_id: the training run, searched if `version` is None; the last resort is an equal manifest.

    Raises:
        VersionNotRegistered: if `version` was never registered.
        ValueError: if no version, or more than one, has this manifest.
    """
    if version is not None:
        return find_version(session, version)
    matches = find_copied_versions(session, manifest, run_id)
    if len(matches) != 1:
        names = ", ".join(f"v{match.version}" for match in matches) or "no version"
        raise ValueError(f"{names} has this folder's manifest; say which version it is with --version")
    return matches[0]


def find_copied_versions(session: Session, manifest: ModelManifest, run_id: str) -> Sequence[ModelVersion]:
    """Return the version of a training run, else those with this manifest; there may be none."""
    version_of_run = find_version_of_run(session, run_id)
    if version_of_run is not None:
        return [version_of_run]
    return session.scalars(select(ModelVersion).where(ModelVersion.manifest == manifest.to_json())).all()


def find_untested_cases(
    session: Session, version: int, conditions: EvaluationConditions | None = None
) -> Sequence[Case]:
    """Return the active cases for which the version has no result yet.

    Args:
        conditions: of the results; a result of others does not count. None: every result counts.
    """
    tested = select(CaseResult.case_id).where(CaseResult.version == version)
    if conditions is not None:
        tested = tested.where(CaseResult.conditions == conditions.key)
    query = select(Case).where(Case.withdrawn_at.is_(None), Case.id.not_in(tested))
    return session.scalars(query.order_by(Case.id)).all()


def find_evaluation_limits(session: Session, version: int) -> EvaluationSection:
    """Return the limits of answers in the recipe of the version's round; the defaults if no round made it."""
    record = find_version(session, version)
    training_round = None if record.round_id is None else session.get(Round, record.round_id)
    if training_round is None or training_round.recipe is None:
        return EvaluationSection()
    return read_recipe(training_round)[1].evaluation


def read_parameters(training_round: Round) -> RoundParameters:
    """Return the round's parameters; those that an older release did not store have their defaults."""
    return RoundParameters.model_validate(training_round.parameters)


def read_decision(training_round: Round) -> PromotionDecision | None:
    """Return the gate's decision on the round's candidate; None if there is none, or the stored one is malformed."""
    if training_round.decision is None:
        return None
    try:
        return PromotionDecision.model_validate(training_round.decision)
    except ValidationError as error:
        # Show the round without it: one malformed record must not hide all rounds of the front page.
        log.warning("the decision of round %d cannot be read: %s", training_round.number, describe_errors(error))
        return None


def record_repeated_verdicts(session: Session, round_id: str, repeated: RepeatedVerdicts) -> None:
    """Record the verdicts on the champion that a round computed again."""
    session.get_one(Round, round_id).repeated_verdicts = repeated.model_dump()


def read_repeated_verdicts(training_round: Round) -> RepeatedVerdicts | None:
    """Return the verdicts that the round computed again; None if there are none, or the stored ones are malformed."""
    stored = training_round.repeated_verdicts
    try:
        return None if stored is None else RepeatedVerdicts.model_validate(stored)
    except ValidationError as error:  # the rest of the round's record counts too
        log.warning(
            "the repeated verdicts of round %d cannot be read: %s", training_round.number, describe_errors(error)
        )
        return None


def find_judged_verdicts(
    session: Session, version: int, conditions: EvaluationConditions, limit: int, seed: str
) -> list[tuple[Case, bool]]:
    """Return a random choice of active cases that were judged under some conditions, with their verdicts.

    Args:
        limit: cases at most.
        seed: the same one gives the same choice.
    """
    is_judged = (
        (CaseResult.version == version)
        & (CaseResult.conditions == conditions.key)
        & CaseResult.reason.is_(None)
        & Case.withdrawn_at.is_(None)
    )
    query = select(Case, CaseResult.passed).join(CaseResult, CaseResult.case_id == Case.id).where(is_judged)
    rows = session.execute(query.order_by(func.md5(Case.id + seed)).limit(limit))
    return [(case, passed) for case, passed in rows]


def describe_round_end(training_round: Round) -> str | None:
    """Return a one-sentence public summary of how a round ended, None while it runs; only operators see `reason`."""
    if training_round.state == RoundState.FAILED:
        return f"failed while {STEP_ACTIVITIES.get(training_round.step, training_round.step)}; operators see why"
    if training_round.state == RoundState.REJECTED:
        decision = read_decision(training_round)
        num_regressions = 0 if decision is None else len(decision.regressions)
        detail = f": {num_regressions} reports that passed before fail again" if num_regressions else ""
        return f"did not pass the gate{detail}"
    if training_round.state == RoundState.PROMOTED:
        return f"v{training_round.candidate_version} is the champion"
    return "cancelled" if training_round.state == RoundState.CANCELLED else None


def describe_round(session: Session, training_round: Round) -> RoundOut:
    """Build a round's public record."""
    run = session.scalar(select(TrainingRun).where(TrainingRun.round_id == training_round.id))
    return RoundOut(
        id=training_round.id,
        number=training_round.number,
        state=training_round.state,
        step=training_round.step,
        reason=training_round.reason,
        recipe=None if training_round.recipe is None else str(training_round.recipe.get("name")),
        parent_version=training_round.parent_version,
        started_from=None if run is None else run.started_from,
        candidate_version=training_round.candidate_version,
        snapshot_id=training_round.snapshot_id,
        activity=training_round.activity,
        token_counts=training_round.token_counts,
        decision=read_decision(training_round),
        repeated_verdicts=read_repeated_verdicts(training_round),
        failed_items={get_item_step_name(step): count for step, count in training_round.failed_items.items()},
        status=None if run is None else run.status,
        created_at=training_round.created_at,
        finished_at=training_round.finished_at,
        timeline=_read_timeline(session, training_round),
    )


def _read_timeline(session: Session, training_round: Round) -> list[Event]:
    """Return the start time of each step; a step that was restarted after a kill appears once per start."""
    query = select(AuditEvent).where(AuditEvent.subject == training_round.id, AuditEvent.action == STEP_BEGUN_ACTION)
    return [
        Event(at=event.created_at, text=str(event.detail["step"]))
        for event in session.scalars(query.order_by(AuditEvent.id))
    ]
