"""The round as a Prefect flow: the table of contents of the loop."""

from dataclasses import replace
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from feedback import rounds
from feedback.contracts import RoundParameters
from feedback.tables import new_id
from flows import intake, judging, layout, supervise, training
from flows.context import Context, open_context
from flows.progress import RunCancelled, progress_reporter
from flows.registry import RoundForm
from flows.steps import Hopeless, show_table, step, without_text
from infra.process_group import alone
from yuan.plan.plan_record import Plan
from yuan.plan.table import as_table

collect = step(intake.collect, "collect")
snapshot = step(intake.snapshot, "snapshot")
lay_out = step(layout.lay_out, "plan")
train = step(supervise.train, "train")
register = step(training.register, "register")
evaluate = step(judging.evaluate, "evaluate")
decide = step(judging.decide, "decide")
tell = step(judging.tell, "tell")


@flow(
    name="cotrain-round",
    description="One turn of the loop: screen, reproduce, freeze, plan, train, evaluate, decide, tell.",
    validate_parameters=False,  # flows.engine has, before Prefect sees them
)
def cotrain_round(form: RoundForm) -> str | State[str]:
    """Run a round to its end and return its final state; a round that has ended is left as it is."""
    context = open_context()
    round_id = form.round_id
    if round_id is None:
        # The dispatcher starts every requested round under a key of its own; this run only filed the request.
        return f"requested round {request(context, form.round_parameters())}"
    with context.sessions() as session:
        attempt = rounds.find_round(session, round_id).attempt
    try:
        # An earlier attempt may be leaving still; two of them must not write the same files.
        with without_text("the round"), alone(context.lock_of(round_id)):
            return run_steps(replace(context, attempt=attempt), round_id)
    except rounds.RoundEnded as ended:
        return str(ended)
    except RunCancelled as cancelled:
        fail(context, round_id, str(cancelled), state="cancelled")
        return Cancelled(message=str(cancelled))
    except Hopeless as error:
        fail(context, round_id, str(error))
        raise


def run_steps(context: Context, round_id: str) -> str:
    """Take a round through its steps; those it has passed are passed by.

    Raises:
        RoundEnded: if the round has ended, or a later attempt works on it.
    """
    collected = collect(context, round_id)
    show_table("collected", [collected])
    snapshot(context, round_id)
    plan = lay_out(context, round_id)
    stages = enumerate(plan.stages)
    show_table("plan", [{"stage": n, "layers": s.layers, "bytes": s.memory_bytes} for n, s in stages])
    create_markdown_artifact(key="plan-explained", markdown=plan_text(context, round_id, plan))
    train(context, round_id, progress_reporter())
    register(context, round_id)
    show_table("evaluated", evaluate(context, round_id))
    decision = decide(context, round_id)
    show_table("gate", gate_rows(decision))
    create_markdown_artifact(key="decision", markdown=decision_text(decision))
    tell(context)
    with context.sessions() as session:
        return rounds.find_round(session, round_id).state


def request(context: Context, parameters: RoundParameters) -> str:
    """File the row that pressing Run stands for."""
    with context.sessions.begin() as session:
        return rounds.request_round(session, "prefect", parameters, new_id()).id


def fail(context: Context, round_id: str, reason: str, state: str = "failed") -> None:
    """End the round without a version, with the reason on its page."""
    with context.sessions.begin() as session:
        rounds.finish(session, round_id, state, reason[:2000])


def gate_rows(decision: dict[str, Any]) -> list[dict[str, Any]]:
    """The decision's suites as table rows."""
    return [
        {
            "suite": suite["suite"],
            "before": f"{suite['before']['rate']:.3f}" if suite["before"] else "",
            "after": f"{suite['after']['rate']:.3f}",
            "interval": "{:.3f} to {:.3f}".format(*suite["after"]["interval"]),
            "cases": suite["after"]["total"],
        }
        for suite in decision.get("suites", [])
    ]


def plan_text(context: Context, round_id: str, plan: Plan) -> str:
    """The plan for people: its table and its drawing, which the portal serves."""
    with context.sessions() as session:
        number = rounds.find_round(session, round_id).number
    picture = f"{context.settings.portal_url}/rounds/{number}/plan.svg"
    return f"```text\n{as_table(plan)}\n```\n\n[![the plan, drawn]({picture})]({picture})"


def decision_text(decision: dict[str, Any]) -> str:
    reasons = "; ".join(decision["reasons"]) or "nothing speaks against it"
    return f"**v{decision['candidate']}** {'promoted' if decision['promote'] else 'not promoted'}: {reasons}"
