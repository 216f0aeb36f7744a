"""Collect uploads into a frozen mixture, in a round's first steps; process reports between rounds."""

import logging
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from feedback import reports, rounds, snapshots
from feedback.accounts import audit
from feedback.dataset_acceptance import accept_dataset, find_checked_datasets, record_acceptance_failure
from feedback.promotion import find_champion
from feedback.reproduce import reproduce_answers
from flows.context import Context
from infra.faults import is_item_error
from yuan.data.judge import AnswerJudge

log = logging.getLogger(__name__)

# Half of the reports are held out, so that a hundred reports still give a pass rate with a useful interval.
HELD_OUT_REPORT_SHARE = 0.5
REVIEWER = "reproduction"  # actor in the audit log: a report is accepted if the champion fails on it


@dataclass(frozen=True)
class CollectedCounts:
    """Numbers of what a round collected, as its table `collected` shows them; `failed` counts items of every kind."""

    accepted: int
    rejected: int
    disputed: int
    screened: int
    datasets: int
    failed: int


def collect(context: Context, round_id: str) -> CollectedCounts | None:
    """Screen, reproduce against the champion, review, and accept what was uploaded before the cut-off.

    Returns:
        The numbers of items; None if the round is past this step.
    """
    with context.sessions.begin() as session:
        if not rounds.begin_step(session, round_id, "collect", context.attempt):
            return None
        training_round = rounds.find_round(session, round_id)
        cut_off, parent = training_round.cut_off, training_round.parent_version

    num_screened, not_screened = _screen(context, cut_off)
    not_reproduced = 0 if parent is None else _reproduce(context, cut_off, parent, limit=None)[1]
    reviewed = _review(context, cut_off, round_id)
    num_accepted, not_accepted = _accept_datasets(context, cut_off)

    failed = {
        "screen": not_screened,
        "reproduce": not_reproduced,
        "review": reviewed.failed,
        "accept": not_accepted,
    }
    with context.sessions.begin() as session:
        rounds.record_failed_items(session, round_id, failed)
    counts = CollectedCounts(
        accepted=reviewed.accepted,
        rejected=reviewed.rejected,
        disputed=reviewed.disputed,
        screened=num_screened,
        datasets=num_accepted,
        failed=sum(failed.values()),
    )
    log.info("collected: %s", asdict(counts))
    return counts


def _accept_datasets(context: Context, cut_off: datetime) -> tuple[int, int]:
    """Accept checked datasets, each in its own transaction; return the numbers accepted and failed."""
    share, max_cases = context.settings.held_out_share, context.settings.max_account_cases
    with context.sessions() as session:
        dataset_ids = find_checked_datasets(session, cut_off)
    failed = 0
    for dataset_id in dataset_ids:
        try:
            with context.sessions.begin() as session:
                accept_dataset(session, dataset_id, context.objects.get, context.salt, share, max_cases)
        except Exception as error:
            if not is_item_error(error):
                raise
            failed += 1
            with context.sessions.begin() as session:
                record_acceptance_failure(session, dataset_id, error)
    return len(dataset_ids) - failed, failed


@dataclass(frozen=True)
class WaitingReportsCounts:
    """Numbers of reports processed between rounds; `review` is None while a round runs, since none is reviewed then."""

    screened: int = 0
    reproduced: int = 0
    failed: int = 0
    review: reports.ReviewCounts | None = None

    def to_row(self) -> dict[str, int]:
        """Return the counts as the table `processed-reports` shows them; `failed` is the sum over the steps."""
        review = {} if self.review is None else asdict(self.review)
        failed = self.failed + review.pop("failed", 0)
        return {"screened": self.screened, "asked_again": self.reproduced, **review, "failed": failed}


def process_waiting_reports(context: Context, limit: int) -> WaitingReportsCounts | None:
    """Screen new reports, reproduce at most `limit` of them against the champion, and review them.

    No report is accepted while a round runs: a new held-out case could already be in its frozen mixture.

    Returns:
        The numbers of reports; None if there is no champion yet.
    """
    now = datetime.now(timezone.utc)
    with context.sessions() as session:
        version = find_champion(session)
    if version is None:
        return None

    num_screened, not_screened = _screen(context, now)
    num_reproduced, not_reproduced = _reproduce(context, now, version, limit)
    with context.sessions() as session:
        is_running = rounds.find_running_round(session) is not None
    review = None if is_running else _review(context, now, f"v{version}")
    return WaitingReportsCounts(num_screened, num_reproduced, not_screened + not_reproduced, review)


def _screen(context: Context, cut_off: datetime) -> tuple[int, int]:
    with context.sessions.begin() as session:
        return reports.screen_reports(session, cut_off)


def _reproduce(context: Context, cut_off: datetime, version: int, limit: int | None) -> tuple[int, int]:
    """Query the version with the prompts of reports, and store each batch; return the numbers queried and failed."""
    with context.sessions() as session:
        rows = reports.find_unreproduced_reports(session, cut_off, version, limit)
        ids = [row.id for row in rows]
        prompts = [str(row.body.get("prompt", "")) for row in rows]

    num_queried = failed = 0
    with AnswerJudge() as judge:
        for answers in reproduce_answers(context.settings, prompts, version):
            batch = list(zip(ids[num_queried:], answers, strict=False))
            with context.sessions.begin() as session:
                failed += reports.note_reproductions(session, version, batch, judge.check)
            num_queried += len(answers)
    log.info("reproduced %d reports against v%d, %d could not be processed", num_queried, version, failed)
    return num_queried, failed


def _review(context: Context, cut_off: datetime, subject: str) -> reports.ReviewCounts:
    with context.sessions.begin() as session:
        counts = reports.review_reports(session, cut_off, context.salt, HELD_OUT_REPORT_SHARE)
        audit(session, REVIEWER, "reviewed", subject, **asdict(counts))
    return counts


def freeze_snapshot(context: Context, round_id: str) -> str:
    """Freeze the round's mixture and return its id."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "snapshot", context.attempt)

        def store(data: bytes) -> str:
            return context.objects.put_by_sha256(snapshots.SNAPSHOTS_FOLDER, data)

        snapshot_id = snapshots.freeze_mixture(session, round_id, context.objects.get, store)
        rounds.record_failed_items(session, round_id, {"snapshot": snapshots.read_failed_count(session, snapshot_id)})
    log.info("froze snapshot %s", snapshot_id[:12])
    return snapshot_id
