"""The Prefect flow that checks the datasets which were sent in parts."""

from dataclasses import asdict

from prefect import flow

from feedback.dataset_checks import DatasetCheckCounts, process_uploads
from feedback.row_blocks import StagingRules
from flows.allowed_flows import CHECK_DATASETS_FLOW, CheckDatasetsForm
from flows.context import Context, open_context
from flows.round.artifacts import publish_table
from flows.round.tasks import make_task
from flows.round.versions import make_scratch_folder
from infra.process_group import hold_file_lock


def check_waiting_datasets(context: Context) -> DatasetCheckCounts:
    """Check the complete uploads, one after the other; a second process waits for the first."""
    context.runs.mkdir(parents=True, exist_ok=True)
    rules = StagingRules(context.salt, context.settings.held_out_share)
    with (
        hold_file_lock(context.runs / ".check-datasets.lock"),
        make_scratch_folder(context.runs / ".check-datasets") as scratch,
    ):
        return process_uploads(context.sessions, context.objects, rules, scratch)


check_datasets_task = make_task(check_waiting_datasets, "check datasets")


@flow(
    name=CHECK_DATASETS_FLOW,
    description="Check datasets that were sent in parts, drop abandoned uploads, and delete what ended ones left.",
    validate_parameters=False,  # flows.dispatcher.flow_process validates them before Prefect sees them
)
def cotrain_check_datasets(form: CheckDatasetsForm) -> dict[str, int]:
    """Process uploads; the dispatcher starts this flow when one waits."""
    counts = asdict(check_datasets_task(open_context()))
    publish_table("checked-datasets", [counts])
    return counts
