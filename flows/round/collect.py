"""Collect uploads into a frozen mixture, in a round's first steps; process reports between rounds."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from feedback import reports, rounds, snapshots
from feedback.accounts import audit
from feedback.dataset_acceptance import accept_dataset, find_checked_datasets, record_acceptance_failure
from feedback.items import ItemCounts
from feedback.key_upgrade import (
    find_outdated_datasets,
    record_upgrade_failure,
    upgrade_dataset_keys,
    upgrade_report_keys,
)
from feedback.promotion import find_champion
from feedback.reproduce import make_reproduction_prompt, reproduce_answers, wait_until_served
from feedback.round_steps import ItemStep, RoundStep
from feedback.tables import read_transaction_time
from flows.context import Context
from flows.round.round_recipe import settle_recipe
from flows.round.versions import make_scratch_folder
from flows.supervisor.run_reporter import tolerate_outage
from infra.faults import is_item_error
from yuan.data.judge import AnswerJudge

log = logging.getLogger(__name__)

# Half of the reports are held out, so that a hundred reports still give a pass rate with a useful interval.
HELD_OUT_REPORT_SHARE = 0.5
# The device of the model server may be lent to an evaluation. A round goes on without the reports after this time.
SERVED_WAIT_S = 1800.0
REVIEWER = "reproduction"  # actor in the audit log: a report is accepted if the champion fails on it


@dataclass(frozen=True)
class CollectedCounts:
    """Numbers of what a round collected, as its table `collected` shows them.

    Attributes:
        accepted, rejected, disputed: reports, by the outcome of their review.
        screened: reports, those that failed included.
        datasets: datasets that were accepted.
        failed: items of every kind that could not be processed.
    """

    accepted: int
    rejected: int
    disputed: int
    screened: int
    datasets: int
    failed: int


def collect_reports_and_datasets(context: Context, round_id: str) -> CollectedCounts | None:
    """Screen, reproduce against the champion, review, and accept what was uploaded before the cut-off.

    Returns:
        The numbers of items; None if the round is past this step.
    """
    settle_recipe(context, round_id)
    with context.sessions.begin() as session:
        if not rounds.begin_step(session, round_id, RoundStep.COLLECT, context.attempt):
            return None
        training_round = rounds.find_round(session, round_id)
        cut_off = training_round.cut_off
        parent_version = training_round.parent_version

    upgraded = upgrade_keys(context)
    screened = _screen_reports(context, cut_off)
    reproduced = ItemCounts()
    if parent_version is not None:  # the first round has no model to reproduce reports against
        reproduced = _reproduce_reports(
            context, cut_off, parent_version, limit=None, report_waiting=lambda: record_waiting(context, round_id)
        )
    reviewed = _review_reports(context, cut_off, round_id)
    datasets = _accept_datasets(context, cut_off)

    num_failed_by_step = {
        ItemStep.SCREEN: screened.num_failed,
        ItemStep.REPRODUCE: reproduced.num_failed,
        ItemStep.REVIEW: reviewed.failed,
        ItemStep.ACCEPT: datasets.num_failed + upgraded.num_failed,
    }
    with context.sessions.begin() as session:
        rounds.record_failed_items(session, round_id, num_failed_by_step)
    counts = CollectedCounts(
        accepted=reviewed.accepted,
        rejected=reviewed.rejected,
        disputed=reviewed.disputed,
        screened=screened.num_items,
        datasets=datasets.num_items - datasets.num_failed,
        failed=sum(num_failed_by_step.values()),
    )
    log.info("collected: %s", asdict(counts))
    return counts


def _accept_datasets(context: Context, cut_off: datetime) -> ItemCounts:
    """Accept checked datasets."""
    held_out_share = context.settings.held_out_share
    max_cases = context.settings.max_account_cases
    with context.sessions() as session:
        dataset_ids = find_checked_datasets(session, cut_off)

    def accept(session: Session, dataset_id: str) -> None:
        accept_dataset(session, dataset_id, context.objects.open_stream, context.salt, held_out_share, max_cases)

    return _process_datasets(context, dataset_ids, accept, record_acceptance_failure)


def upgrade_keys(context: Context) -> ItemCounts:
    """Recompute keys that an older release computed by another rule, before they are compared with new ones."""
    with context.sessions.begin() as session:
        num_failed_cases = upgrade_report_keys(session)
        dataset_ids = find_outdated_datasets(session)

    def upgrade(session: Session, dataset_id: str) -> None:
        upgrade_dataset_keys(session, dataset_id, context.objects.open_stream)

    datasets = _process_datasets(context, dataset_ids, upgrade, record_upgrade_failure)
    if datasets.num_items:
        log.info("upgraded the keys of %d datasets, %d failed", datasets.num_items, datasets.num_failed)
    return ItemCounts(datasets.num_items, datasets.num_failed + num_failed_cases)


def _process_datasets(
    context: Context,
    dataset_ids: Sequence[str],
    process: Callable[[Session, str], None],
    record_failure: Callable[[Session, str, Exception], None],
) -> ItemCounts:
    """Process datasets, each in its own transaction, so that one that fails stops no other."""
    num_failed = 0
    for dataset_id in dataset_ids:
        try:
            with context.sessions.begin() as session:
                process(session, dataset_id)
        except Exception as error:
            if not is_item_error(error):
                raise
            num_failed += 1
            with context.sessions.begin() as session:
                record_failure(session, dataset_id, error)
    return ItemCounts(len(dataset_ids), num_failed)


@dataclass(frozen=True)
class WaitingReportsCounts:
    """Numbers of reports processed between rounds.

    Attributes:
        failed: reports that could not be screened or reproduced.
        review: None while a round runs, since no report is reviewed then.
    """

    screened: int = 0
    reproduced: int = 0
    failed: int = 0
    review: reports.ReviewCounts | None = None

    def to_row(self) -> dict[str, int]:
        """Return the counts as the table `processed-reports` shows them; `failed` is the sum over the steps."""
        review = {} if self.review is None else asdict(self.review)
        failed = self.failed + review.pop("failed", 0)
        return {"screened": self.screened, "reproduced": self.reproduced, **review, "failed": failed}


def process_waiting_reports(context: Context, limit: int) -> WaitingReportsCounts | None:
    """Screen new reports, reproduce at most `limit` of them against the champion, and review them.

    No report is accepted while a round runs: a new held-out case could already be in its frozen mixture.

    Returns:
        The numbers of reports; None if there is no champion yet.
    """
    with context.sessions() as session:
        version = find_champion(session)
        now = read_transaction_time(session)
    if version is None:
        return None

    upgrade_keys(context)
    screened = _screen_reports(context, now)
    reproduced = _reproduce_reports(context, now, version, limit)
    with context.sessions() as session:
        is_round_running = rounds.find_running_round(session) is not None
    review = None if is_round_running else _review_reports(context, now, f"v{version}")
    return WaitingReportsCounts(
        screened=screened.num_items,
        reproduced=reproduced.num_items,
        failed=screened.num_failed + reproduced.num_failed,
        review=review,
    )


def _screen_reports(context: Context, cut_off: datetime) -> ItemCounts:
    with context.sessions.begin() as session:
        return reports.screen_reports(session, cut_off)


def record_waiting(context: Context, round_id: str) -> None:
    """Record that a round waits for the model server.

    Raises:
        RoundOwnershipLost: if the round has ended, or a later attempt works on it.
    """
    with tolerate_outage("the round's record"), context.sessions.begin() as session:
        rounds.record_activity(session, round_id, "waits for the model server, to reproduce reports", context.attempt)


def _reproduce_reports(
    context: Context,
    cut_off: datetime,
    version: int,
    limit: int | None,
    report_waiting: Callable[[], None] = lambda: None,
) -> ItemCounts:
    """Query the version with the prompts of reports, `limit` at most, and store the answers batch by batch."""
    with context.sessions() as session:
        unreproduced = reports.find_unreproduced_reports(session, cut_off, version, limit)
        prompts = [make_reproduction_prompt(report) for report in unreproduced]

    if prompts and not wait_until_served(context.settings, version, SERVED_WAIT_S, report_waiting):
        log.warning(
            "v%d is not in service for %.0f s: %d reports are reproduced later", version, SERVED_WAIT_S, len(prompts)
        )
        return ItemCounts()

    num_queried = num_failed = 0
    with AnswerJudge() as judge:
        for batch in reproduce_answers(context.settings, prompts, version):
            with context.sessions.begin() as session:
                num_failed += reports.record_reproductions(session, version, batch, judge.check)
            num_queried += len(batch)
    log.info("reproduced %d reports against v%d, %d could not be processed", num_queried, version, num_failed)
    return ItemCounts(num_queried, num_failed)


def _review_reports(context: Context, cut_off: datetime, subject: str) -> reports.ReviewCounts:
    with context.sessions.begin() as session:
        counts = reports.review_reports(session, cut_off, context.salt, HELD_OUT_REPORT_SHARE)
        audit(session, REVIEWER, "reviewed", subject, **asdict(counts))
    return counts


def freeze_snapshot(context: Context, round_id: str, report_progress: snapshots.ProgressReport | None = None) -> str:
    """Freeze the round's mixture and return its id; see `freeze_mixture` for the progress."""
    replay_rows = settle_recipe(context, round_id).data.replay_rows
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, RoundStep.SNAPSHOT, context.attempt)
    with make_scratch_folder(context.runs / f".freeze-{round_id}") as scratch:
        snapshot_id = snapshots.freeze_mixture(
            context.sessions,
            context.objects,
            round_id,
            context.attempt,
            scratch,
            replay_rows=replay_rows,
            report_progress=report_progress,
        )
    with context.sessions.begin() as session:
        num_failed = snapshots.read_failed_count(session, snapshot_id)
        rounds.record_failed_items(session, round_id, {ItemStep.SNAPSHOT: num_failed})
    log.info("froze snapshot %s", snapshot_id[:12])
    return snapshot_id
