"""The Prefect flows: the training round, and the processing of reports between rounds."""

from dataclasses import asdict, replace

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from feedback import rounds
from feedback.contracts import RoundParameters
from feedback.round_steps import RoundStep
from feedback.states import RoundState
from feedback.tables import new_id
from flows.allowed_flows import CLEAN_UP_FLOW, REPRODUCE_FLOW, ROUND_FLOW, CleanUpForm, ReproduceForm, RoundForm
from flows.context import Context, open_context
from flows.round import cleanup, collect, evaluate, prepare_run, promote, train
from flows.round.artifacts import (
    build_gate_rows,
    build_plan_rows,
    build_repeated_rows,
    build_token_rows,
    format_decision,
    format_plan,
    publish_table,
)
from flows.round.progress import RunCancelled, make_evaluation_callback, make_freeze_callback, make_progress_callback
from flows.round.tasks import StepFailed, StepUnrecoverable, hide_error_text, make_task
from infra.process_group import hold_file_lock

# Operators see these names in Prefect, which stores them with every task run.
collect_task = make_task(collect.collect_reports_and_datasets, RoundStep.COLLECT)
snapshot_task = make_task(collect.freeze_snapshot, RoundStep.SNAPSHOT)
plan_task = make_task(prepare_run.prepare_run_folder, RoundStep.PLAN)
train_task = make_task(train.train_round, RoundStep.TRAIN)
register_task = make_task(evaluate.register_version, "register")
evaluate_task = make_task(evaluate.evaluate_round_versions, RoundStep.EVALUATE)
decide_task = make_task(promote.decide_round, RoundStep.DECIDE)
notify_task = make_task(promote.publish_outcome, "notify")
cleanup_task = make_task(cleanup.clean_up_after_round, "clean up")
clean_up_task = make_task(cleanup.clean_up, "clean up between rounds")
process_reports_task = make_task(collect.process_waiting_reports, "process reports")


@flow(
    name=ROUND_FLOW,
    description="One training round: screen, reproduce, freeze, plan, train, evaluate, decide, notify.",
    validate_parameters=False,  # flows.dispatcher.flow_process validates them before Prefect sees them
)
def cotrain_round(form: RoundForm) -> str | State[str]:
    """Run a round to completion and return its final state; a round that has ended is not changed."""
    context = open_context()
    round_id = form.round_id
    if round_id is None:
        # This run only stores the request; the dispatcher starts the round in another flow run, under its own key.
        return f"requested round {request_round(context, form.round_parameters())}"
    with context.sessions() as session:
        attempt = rounds.find_round(session, round_id).attempt
    try:
        # An earlier attempt may still be exiting; two attempts must not write the same files.
        with hide_error_text("the round"), hold_file_lock(context.get_round_lock(round_id)):
            outcome: str | State[str] = run_steps(replace(context, attempt=attempt), round_id)
    except rounds.RoundOwnershipLost as error:
        outcome = str(error)
    except RunCancelled as error:
        fail_round(context, round_id, str(error), state=RoundState.CANCELLED)
        outcome = Cancelled(message=str(error))
    except StepUnrecoverable as error:
        fail_round(context, round_id, str(error))
        publish_table("removed", cleanup_task(context, round_id))
        raise
    # However the round has ended: rounds that fail fill the disk as well.
    publish_table("removed", cleanup_task(context, round_id))
    return outcome


def run_steps(context: Context, round_id: str) -> str:
    """Run the steps of a round; steps that are complete are skipped.

    Raises:
        RoundOwnershipLost: if the round has ended, or a later attempt works on it.
    """
    collected_counts = collect_task(context, round_id)
    publish_table("collected", [] if collected_counts is None else [asdict(collected_counts)])
    snapshot_task(context, round_id, make_freeze_callback())

    plan = plan_task(context, round_id)
    publish_table("tokens", build_token_rows(context, round_id))
    publish_table("plan", build_plan_rows(plan))
    create_markdown_artifact(key="plan-explained", markdown=format_plan(context, round_id, plan))

    train_task(context, round_id, make_progress_callback())
    register_task(context, round_id)
    evaluation_counts = evaluate_task(context, round_id, make_evaluation_callback())
    publish_table("evaluated", [asdict(version_counts) for version_counts in evaluation_counts])
    publish_table("repeated", build_repeated_rows(context, round_id))

    decision = decide_task(context, round_id)
    publish_table("gate", build_gate_rows(decision))
    create_markdown_artifact(key="decision", markdown=format_decision(decision))
    notify_task(context)
    with context.sessions() as session:
        return rounds.find_round(session, round_id).state


@flow(
    name=CLEAN_UP_FLOW,
    description="Remove what the retention policy keeps no longer, after a round whose own flow could not.",
    validate_parameters=False,  # flows.dispatcher.flow_process validates them before Prefect sees them
)
def cotrain_clean_up(form: CleanUpForm) -> int:
    """Clean up and return the number of removed bytes; the dispatcher starts this flow when it is due.

    Raises:
        StepFailed: if something could not be removed; the table names it.
    """
    report = clean_up_task(open_context())
    publish_table("removed", report.to_rows())
    if report.problems:
        raise StepFailed(f"{len(report.problems)} kinds of files were not cleaned: see the table `removed`")
    return int(report.num_bytes)


def request_round(context: Context, parameters: RoundParameters) -> str:
    """Store a request for a round and return its id."""
    with context.sessions.begin() as session:
        return rounds.request_round(session, "prefect", parameters, new_id()).id


def fail_round(context: Context, round_id: str, reason: str, state: RoundState = RoundState.FAILED) -> None:
    """End the round without a promoted version; the portal shows the reason."""
    with context.sessions.begin() as session:
        rounds.finish_round(session, round_id, state, reason[:2000])


@flow(
    name=REPRODUCE_FLOW,
    description="Between rounds: screen new reports, reproduce them against the champion, accept those it fails on.",
    validate_parameters=False,  # flows.dispatcher.flow_process validates them before Prefect sees them
)
def cotrain_reproduce(form: ReproduceForm) -> dict[str, int]:
    """Process waiting reports; the dispatcher starts this flow when there are some."""
    counts = process_reports_task(open_context(), form.limit)
    row: dict[str, int] = {} if counts is None else counts.to_row()
    publish_table("processed-reports", [row])
    return row
