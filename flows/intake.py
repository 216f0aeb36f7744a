"""First half of a round: from reports and uploads to a frozen mixture and its plan."""

import logging
from typing import Any

from feedback import datasets, reports, rounds
from feedback.accounts import audit
from feedback.reproduce import ask_again
from flows.context import Context

log = logging.getLogger(__name__)

# Half of the reports test only, so that a hundred of them still give a rate with a useful interval.
HELD_OUT_REPORTS = 0.5


def collect(context: Context, round_id: str) -> dict[str, Any]:
    """Screen, reproduce against the champion, review, and accept what was uploaded before the cut-off."""
    with context.sessions.begin() as session:
        if not rounds.begin_step(session, round_id, "collect"):
            return {}
        turn = rounds.find_round(session, round_id)
        cut_off, champion, policy = turn.cut_off, turn.parent_version, turn.parameters["policy"]
        screened = reports.screen(session, cut_off)
    if champion is not None:
        _reproduce(context, round_id, champion)
    with context.sessions.begin() as session:
        counts = reports.review(session, cut_off, context.salt, HELD_OUT_REPORTS)
        waiting = datasets.checked(session, cut_off)
        audit(session, f"policy {policy}", "reviewed", round_id, **counts)
    for dataset_id in waiting:
        with context.sessions.begin() as session:
            datasets.accept(session, dataset_id, context.objects.get, context.salt, context.settings.held_out_share)
    log.info("screened %d reports and accepted %d datasets: %s", screened, len(waiting), counts)
    return {"screened": screened, "datasets": len(waiting), **counts}


def _reproduce(context: Context, round_id: str, champion: int) -> None:
    with context.sessions() as session:
        cut_off = rounds.find_round(session, round_id).cut_off
        todo = [(row.id, str(row.body["prompt"])) for row in reports.unreproduced(session, cut_off, champion)]
    answers = ask_again(context.settings, [prompt for _, prompt in todo], champion)
    with context.sessions.begin() as session:
        for (feedback_id, _), answer in zip(todo, answers, strict=True):
            reports.note_reproduction(session, feedback_id, champion, answer)
    log.info("asked v%d again about %d reports", champion, len(todo))


def snapshot(context: Context, round_id: str) -> str:
    """Freeze the round's mixture and return its id."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "snapshot")

        def store(data: bytes) -> str:
            return context.objects.put_named_by_content(datasets.SNAPSHOTS, data)

        snapshot_id = datasets.freeze(session, round_id, context.objects.get, store)
    log.info("froze snapshot %s", snapshot_id[:12])
    return snapshot_id
