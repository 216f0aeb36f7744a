"""The Prefect flows: the training round, and the processing of reports between rounds."""

from dataclasses import asdict, replace

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from feedback import rounds
from feedback.contracts import RoundParameters
from feedback.tables import new_id
from flows.context import Context, open_context
from flows.registry import REPRODUCE_FLOW, ROUND_FLOW, ReproduceForm, RoundForm
from flows.round import collect as collecting
from flows.round import evaluate as evaluation
from flows.round import prepare_run, promote
from flows.round.artifacts import build_gate_rows, build_plan_rows, format_decision, format_plan, publish_table
from flows.round.progress import RunCancelled, make_progress_callback
from flows.round.tasks import StepUnrecoverable, hide_error_text, make_step
from flows.supervisor import supervisor
from infra.process_group import hold_file_lock

process_waiting_reports = make_step(collecting.process_waiting_reports, "process reports")
collect = make_step(collecting.collect, "collect")
freeze_snapshot = make_step(collecting.freeze_snapshot, "snapshot")
prepare_run_folder = make_step(prepare_run.prepare_run_folder, "plan")
train = make_step(supervisor.train, "train")
register_version = make_step(evaluation.register_version, "register")
evaluate = make_step(evaluation.evaluate, "evaluate")
decide = make_step(promote.decide, "decide")
publish_outcome = make_step(promote.publish_outcome, "notify")


@flow(
    name=ROUND_FLOW,
    description="One training round: screen, reproduce, freeze, plan, train, evaluate, decide, notify.",
    validate_parameters=False,  # flows.dispatcher.flow_process has, before Prefect sees them
)
def cotrain_round(form: RoundForm) -> str | State[str]:
    """Run a round to completion and return its final state; a round that has ended is not changed."""
    context = open_context()
    round_id = form.round_id
    if round_id is None:
        # This run only files the request; the dispatcher starts the round in another flow run, under its own key.
        return f"requested round {request_round(context, form.round_parameters())}"
    with context.sessions() as session:
        attempt = rounds.find_round(session, round_id).attempt
    try:
        # An earlier attempt may still be exiting; two attempts must not write the same files.
        with hide_error_text("the round"), hold_file_lock(context.get_round_lock(round_id)):
            return run_steps(replace(context, attempt=attempt), round_id)
    except rounds.RoundOwnershipLost as ended:
        return str(ended)
    except RunCancelled as cancelled:
        fail_round(context, round_id, str(cancelled), state="cancelled")
        return Cancelled(message=str(cancelled))
    except StepUnrecoverable as error:
        fail_round(context, round_id, str(error))
        raise


def run_steps(context: Context, round_id: str) -> str:
    """Run the steps of a round; steps that are complete are skipped.

    Raises:
        RoundOwnershipLost: if the round has ended, or a later attempt works on it.
    """
    collected = collect(context, round_id)
    publish_table("collected", [] if collected is None else [asdict(collected)])
    freeze_snapshot(context, round_id)
    plan = prepare_run_folder(context, round_id)
    publish_table("plan", build_plan_rows(plan))
    create_markdown_artifact(key="plan-explained", markdown=format_plan(context, round_id, plan))
    train(context, round_id, make_progress_callback())
    register_version(context, round_id)
    publish_table("evaluated", [asdict(counts) for counts in evaluate(context, round_id)])
    decision = decide(context, round_id)
    publish_table("gate", build_gate_rows(decision))
    create_markdown_artifact(key="decision", markdown=format_decision(decision))
    publish_outcome(context)
    with context.sessions() as session:
        return rounds.find_round(session, round_id).state


def request_round(context: Context, parameters: RoundParameters) -> str:
    """Store a request for a round and return its id."""
    with context.sessions.begin() as session:
        return rounds.request_round(session, "prefect", parameters, new_id()).id


def fail_round(context: Context, round_id: str, reason: str, state: str = "failed") -> None:
    """End the round without a promoted version; the portal shows the reason."""
    with context.sessions.begin() as session:
        rounds.finish_round(session, round_id, state, reason[:2000])


@flow(
    name=REPRODUCE_FLOW,
    description="Between rounds: screen new reports, reproduce them against the champion, accept those it fails on.",
    validate_parameters=False,  # flows.dispatcher.flow_process has, before Prefect sees them
)
def cotrain_reproduce(form: ReproduceForm) -> dict[str, int]:
    """Process waiting reports; the dispatcher starts this flow when there are some."""
    counts = process_waiting_reports(open_context(), form.limit)
    row: dict[str, int] = {} if counts is None else counts.to_row()
    publish_table("processed-reports", [row])
    return row
