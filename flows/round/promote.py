"""Last part of a round: decide on the candidate, and tell reporters and the registry."""

import logging
from typing import Any

from feedback import gate, promotion, rounds
from flows.context import Context, RecordsContext

log = logging.getLogger(__name__)


def decide(context: Context, round_id: str) -> dict[str, Any]:
    """Judge the candidate; promotion, verdicts, notices and the round's end are one transaction."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "decide", context.attempt)
        turn = rounds.find_round(session, round_id)
        decision = gate.decide_promotion(session, turn)
        if decision["promote"]:
            untold = promotion.promote_candidate(session, turn, decision)
            rounds.record_failed_items(session, round_id, {"tell": untold})
            rounds.finish_round(session, round_id, "promoted", f"v{decision['candidate']} is the champion")
        else:
            turn.decision = decision
            rounds.finish_round(session, round_id, "rejected", "; ".join(decision["reasons"]))
        rounds.notify_dispatcher(session)
    log.info("decided: promote=%s %s", decision["promote"], decision["reasons"])
    return decision


def publish_outcome(context: RecordsContext) -> int:
    """Bring notices to their reporters and the registry's aliases to the champion. Any process may, at any time."""
    with context.sessions.begin() as session:
        delivered = promotion.mark_notices_delivered(session)
    with context.sessions.begin() as session:  # the registry may not answer; what is delivered stays so
        changed = promotion.reconcile_aliases(session, context.tracker.read_aliases(), context.tracker.set_alias)
    if delivered or changed:
        log.info("delivered %d notices, set aliases %s", delivered, changed)
    return delivered
