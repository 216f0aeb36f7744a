"""What happens to reports between rounds, as a Prefect flow."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows import intake
from flows.context import open_context
from flows.steps import show_table, step

take_up = step(intake.take_up, "take up")


@flow(
    name="cotrain-reproduce",
    description="Between rounds: screen new reports, ask the champion again, accept what reproduced.",
)
def cotrain_reproduce(
    limit: Annotated[int, Field(ge=1, le=10_000, description="reports to ask about at most")] = 500,
) -> dict[str, int]:
    """Take up the reports that wait; the dispatcher starts this when some do."""
    counts: dict[str, int] = take_up(open_context(), limit)
    show_table("taken-up", [counts])
    return counts
