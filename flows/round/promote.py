"""Last steps of a round: decide on the candidate, notify reporters and update the registry's aliases."""

import logging

from feedback import gate, promotion, rounds
from feedback.promotion_decision import PromotionDecision
from feedback.round_steps import ItemStep, RoundStep
from feedback.states import RoundState
from flows.context import Context, RecordsContext

log = logging.getLogger(__name__)


def decide_round(context: Context, round_id: str) -> PromotionDecision:
    """Decide on the candidate's promotion; promotion, verdicts, notices and round end are one transaction."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, RoundStep.DECIDE, context.attempt)
        training_round = rounds.find_round(session, round_id)
        decision = gate.decide_promotion(session, training_round)
        if decision.promote:
            num_failed_notices = promotion.promote_candidate(session, training_round, decision)
            rounds.record_failed_items(session, round_id, {ItemStep.NOTIFY: num_failed_notices})
            rounds.finish_round(session, round_id, RoundState.PROMOTED, f"v{decision.candidate} is the champion")
        else:
            training_round.decision = decision.model_dump(mode="json")
            rounds.finish_round(session, round_id, RoundState.REJECTED, "; ".join(decision.reasons))
        rounds.notify_dispatcher(session)
    log.info("decided: promote=%s %s", decision.promote, list(decision.reasons))
    return decision


def publish_outcome(context: RecordsContext) -> int:
    """Deliver notices to reporters and set the registry's aliases to the champion; return the number of notices.

    Safe to call from any process.
    """
    with context.sessions.begin() as session:
        num_delivered = promotion.mark_notices_delivered(session)

    # A separate transaction: an outage of the registry must not undo deliveries.
    with context.sessions.begin() as session:
        changed_aliases = promotion.reconcile_aliases(
            session, context.tracker.read_aliases(), context.tracker.set_alias
        )
    if num_delivered or changed_aliases:
        log.info("delivered %d notices, set aliases %s", num_delivered, changed_aliases)
    return num_delivered
