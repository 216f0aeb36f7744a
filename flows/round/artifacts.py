"""Tables and texts of a round for Prefect's pages."""

from collections.abc import Mapping, Sequence

from prefect.artifacts import create_table_artifact

from feedback import rounds
from feedback.promotion_decision import PromotionDecision
from flows.context import Context
from yuan.data.packing import PackingStats
from yuan.data.shard_tokens import describe_shares
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.table import format_plan_table

TableRow = Mapping[str, str | int]  # cells by column


def publish_table(key: str, rows: Sequence[TableRow]) -> None:
    """Create a table artifact of the rows, if there are any."""
    if any(rows):
        create_table_artifact(key=key, table=[dict(row) for row in rows])


def build_plan_rows(plan: PipelinePlan) -> list[TableRow]:
    """Build table rows of the plan's stages."""
    return [
        {"stage": number, "layers": stage.layers, "bytes": stage.memory_bytes}
        for number, stage in enumerate(plan.stages, 1)
    ]


def build_token_rows(context: Context, round_id: str) -> list[TableRow]:
    """Build table rows of the windows that a round trains on, by part of its mixture."""
    with context.sessions() as session:
        counts_by_part = rounds.find_round(session, round_id).token_counts or {}
    rows: list[TableRow] = []
    for name, stored in counts_by_part.items():
        counts = PackingStats(**stored)
        shares = {share: f"{value:.2%}" for share, value in describe_shares(counts).items()}
        row: dict[str, str | int] = {"part": name, "samples": counts.samples, "windows": counts.windows}
        rows.append({**row, "tokens": counts.targets + counts.masked, "targets": counts.targets, **shares})
    return rows


def build_repeated_rows(context: Context, round_id: str) -> list[TableRow]:
    """Build the table row of the verdicts on the champion that a round computed again, if there are any."""
    with context.sessions() as session:
        repeated = rounds.read_repeated_verdicts(rounds.find_round(session, round_id))
    return [] if repeated is None else [repeated.model_dump()]


def build_gate_rows(decision: PromotionDecision) -> list[TableRow]:
    """Build table rows of the decision's suites."""
    return [
        {
            "suite": suite.suite,
            "before": "" if suite.before is None else f"{suite.before.rate:.3f}",
            "after": f"{suite.after.rate:.3f}",
            "interval": "{:.3f} to {:.3f}".format(*suite.after.interval),
            "cases": suite.after.total,
        }
        for suite in decision.suites
    ]


def format_plan(context: Context, round_id: str, plan: PipelinePlan) -> str:
    """Format the plan as Markdown: its table and a link to its drawing, which the portal serves."""
    with context.sessions() as session:
        number = rounds.find_round(session, round_id).number
    picture = f"{context.settings.portal_url}/rounds/{number}/plan.svg"
    return f"```text\n{format_plan_table(plan)}\n```\n\n[![the plan, drawn]({picture})]({picture})"


def format_decision(decision: PromotionDecision) -> str:
    """Format the decision as one line of Markdown, with the reasons."""
    outcome = "promoted" if decision.promote else "not promoted"
    reasons = "; ".join(decision.reasons) or "all gate conditions are met"
    return f"**v{decision.candidate}** {outcome}: {reasons}"
