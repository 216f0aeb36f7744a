"""First half of a round, and what happens to reports between rounds: from uploads to a frozen mixture."""

import logging
from datetime import datetime, timezone
from typing import Any

from feedback import datasets, reports, rounds, snapshots
from feedback.accounts import audit
from feedback.promotion import find_champion
from feedback.reproduce import reproduce_answers
from flows.context import Context
from infra.faults import is_item_error
from yuan.data.judge import AnswerJudge

log = logging.getLogger(__name__)

# Half of the reports test only, so that a hundred of them still give a rate with a useful interval.
HELD_OUT_REPORT_SHARE = 0.5
REVIEWER = "reproduction"  # who accepts: what the champion fails at is accepted, and nobody else decides yet


def collect(context: Context, round_id: str) -> dict[str, Any]:
    """Screen, reproduce against the champion, review, and accept what was uploaded before the cut-off."""
    with context.sessions.begin() as session:
        if not rounds.begin_step(session, round_id, "collect", context.attempt):
            return {}
        turn = rounds.find_round(session, round_id)
        cut_off, parent = turn.cut_off, turn.parent_version
    screened, unscreened = _screen(context, cut_off)
    unasked = 0 if parent is None else _reproduce(context, cut_off, parent, limit=None)[1]
    counts = _review(context, cut_off, round_id)
    accepted, refused = _accept_datasets(context, cut_off)
    failed = {"screen": unscreened, "reproduce": unasked, "review": counts.pop("failed"), "accept": refused}
    with context.sessions.begin() as session:
        rounds.record_failed_items(session, round_id, failed)
    counts |= {"screened": screened, "datasets": accepted, "failed": sum(failed.values())}
    log.info("collected: %s", counts)
    return counts


def _accept_datasets(context: Context, cut_off: datetime) -> tuple[int, int]:
    """Accept what passed the check, each in a transaction of its own; how many were, and how many could not be."""
    share, max_cases = context.settings.held_out_share, context.settings.max_account_cases
    with context.sessions() as session:
        waiting = datasets.find_checked_datasets(session, cut_off)
    failed = 0
    for dataset_id in waiting:
        try:
            with context.sessions.begin() as session:
                datasets.accept_dataset(session, dataset_id, context.objects.get, context.salt, share, max_cases)
        except Exception as error:
            if not is_item_error(error):
                raise
            failed += 1
            with context.sessions.begin() as session:
                datasets.record_acceptance_failure(session, dataset_id, error)
    return len(waiting) - failed, failed


def process_waiting_reports(context: Context, limit: int) -> dict[str, int]:
    """Between rounds: screen what arrived, ask the champion again about `limit` reports at most, and review.

    While a round is running nothing is accepted: a new held-out case could lie in its frozen mixture already.
    """
    now = datetime.now(timezone.utc)
    with context.sessions() as session:
        version = find_champion(session)
    if version is None:
        return {}
    screened, unscreened = _screen(context, now)
    asked, unasked = _reproduce(context, now, version, limit)
    with context.sessions() as session:
        is_running = rounds.find_running_round(session) is not None
    counts = {} if is_running else _review(context, now, f"v{version}")
    failed = unscreened + unasked + counts.pop("failed", 0)
    return {"screened": screened, "asked_again": asked, **counts, "failed": failed}


def _screen(context: Context, cut_off: datetime) -> tuple[int, int]:
    with context.sessions.begin() as session:
        return reports.screen_reports(session, cut_off)


def _reproduce(context: Context, cut_off: datetime, version: int, limit: int | None) -> tuple[int, int]:
    """Ask the version about reports, each batch kept before the next is asked; how many, and how many could not be."""
    with context.sessions() as session:
        found = reports.find_unreproduced_reports(session, cut_off, version, limit)
        ids, prompts = [row.id for row in found], [str(row.body.get("prompt", "")) for row in found]
    done = failed = 0
    with AnswerJudge() as judge:
        for answers in reproduce_answers(context.settings, prompts, version):
            batch = list(zip(ids[done:], answers, strict=False))
            with context.sessions.begin() as session:
                failed += reports.note_reproductions(session, version, batch, judge.check)
            done += len(answers)
    log.info("asked v%d again about %d reports, %d could not be processed", version, done, failed)
    return done, failed


def _review(context: Context, cut_off: datetime, subject: str) -> dict[str, int]:
    with context.sessions.begin() as session:
        counts = reports.review_reports(session, cut_off, context.salt, HELD_OUT_REPORT_SHARE)
        audit(session, REVIEWER, "reviewed", subject, **counts)
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
