"""First half of a round, and what happens to reports between rounds: from uploads to a frozen mixture."""

import logging
from datetime import datetime, timezone
from typing import Any

from feedback import datasets, reports, rounds
from feedback.accounts import audit
from feedback.promotion import champion
from feedback.reproduce import ask_again
from flows.context import Context

log = logging.getLogger(__name__)

# Half of the reports test only, so that a hundred of them still give a rate with a useful interval.
HELD_OUT_REPORTS = 0.5
POLICY = "reproduced"  # the acceptance policy between rounds


def collect(context: Context, round_id: str) -> dict[str, Any]:
    """Screen, reproduce against the champion, review, and accept what was uploaded before the cut-off."""
    with context.sessions.begin() as session:
        if not rounds.begin_step(session, round_id, "collect", context.attempt):
            return {}
        turn = rounds.find_round(session, round_id)
        cut_off, parent, policy = turn.cut_off, turn.parent_version, turn.parameters["policy"]
    screened = _screen(context, cut_off)
    if parent is not None:
        _reproduce(context, cut_off, parent, limit=None)
    counts = _review(context, cut_off, policy, round_id)
    with context.sessions() as session:
        waiting = datasets.checked(session, cut_off)
    for dataset_id in waiting:
        with context.sessions.begin() as session:
            datasets.accept(session, dataset_id, context.objects.get, context.salt, context.settings.held_out_share)
    log.info("screened %d reports and accepted %d datasets: %s", screened, len(waiting), counts)
    return {"screened": screened, "datasets": len(waiting), **counts}


def take_up(context: Context, limit: int) -> dict[str, int]:
    """Between rounds: screen what arrived, ask the champion again about `limit` reports at most, and review.

    While a round is running nothing is accepted: a new held-out case could lie in its frozen mixture already.
    """
    now = datetime.now(timezone.utc)
    with context.sessions() as session:
        version = champion(session)
    if version is None:
        return {}
    screened = _screen(context, now)
    reproduced = _reproduce(context, now, version, limit)
    with context.sessions() as session:
        is_running = rounds.running_round(session) is not None
    counts = {} if is_running else _review(context, now, POLICY, f"v{version}")
    return {"screened": screened, "asked_again": reproduced, **counts}


def _screen(context: Context, cut_off: datetime) -> int:
    with context.sessions.begin() as session:
        return reports.screen(session, cut_off)


def _reproduce(context: Context, cut_off: datetime, version: int, limit: int | None) -> int:
    with context.sessions() as session:
        found = reports.unreproduced(session, cut_off, version, limit)
        todo = [(row.id, str(row.body["prompt"])) for row in found]
    answers = ask_again(context.settings, [prompt for _, prompt in todo], version)
    with context.sessions.begin() as session:
        for (feedback_id, _), answer in zip(todo, answers, strict=True):
            reports.note_reproduction(session, feedback_id, version, answer)
    log.info("asked v%d again about %d reports", version, len(todo))
    return len(todo)


def _review(context: Context, cut_off: datetime, policy: str, subject: str) -> dict[str, int]:
    with context.sessions.begin() as session:
        counts = reports.review(session, cut_off, context.salt, HELD_OUT_REPORTS)
        audit(session, f"policy {policy}", "reviewed", subject, **counts)
    return counts


def snapshot(context: Context, round_id: str) -> str:
    """Freeze the round's mixture and return its id."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "snapshot", context.attempt)

        def store(data: bytes) -> str:
            return context.objects.put_named_by_content(datasets.SNAPSHOTS, data)

        snapshot_id = datasets.freeze(session, round_id, context.objects.get, store)
    log.info("froze snapshot %s", snapshot_id[:12])
    return snapshot_id
