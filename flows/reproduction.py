"""What happens to reports between rounds, as a Prefect flow."""

from prefect import flow

from flows import intake
from flows.context import open_context
from flows.registry import ReproduceForm
from flows.steps import show_table, step

take_up = step(intake.take_up, "take up")


@flow(
    name="cotrain-reproduce",
    description="Between rounds: screen new reports, ask the champion again, accept what reproduced.",
    validate_parameters=False,  # flows.engine has, before Prefect sees them
)
def cotrain_reproduce(form: ReproduceForm) -> dict[str, int]:
    """Take up the reports that wait; the dispatcher starts this when some do."""
    counts: dict[str, int] = take_up(open_context(), form.limit)
    show_table("taken-up", [counts])
    return counts
