"""Promote a version by an operator's request, with the rules of a round."""

import logging
from dataclasses import dataclass

from feedback import registrations, rounds
from feedback.accounts import OPERATOR_ACCOUNT_NAME
from feedback.promotion import find_champion
from feedback.promotion_decision import PromotionDecision
from feedback.registrations import ChampionRefused
from flows.context import Context
from flows.round.evaluate import evaluate_version
from flows.round.promote import publish_outcome
from yuan.model.model_manifest import MODEL_MANIFEST_FILE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OperatorPromotion:
    """A version that is the champion.

    Attributes:
        decision: the gate's; None if it was the champion before.
    """

    version: int
    decision: PromotionDecision | None


def promote_version(context: Context, version: int) -> OperatorPromotion:
    """Evaluate a version and the champion with the version's limits of answers, and let the gate decide.

    Cases for which the version and the champion have such a result already are not evaluated again.

    A call that was interrupted is repeated; one for the champion sets the aliases and delivers notices, nothing else.

    Raises:
        VersionNotRegistered: if there never was such a version.
        VersionLost: if the registry has lost it.
        ChampionRefused: if a round is running, it is not smoke-tested, its files are gone, or the gate refuses it.
        RuntimeError: if an evaluation fails.
    """
    with context.sessions() as session:
        is_new = registrations.check_promotable(session, version)
        champion = find_champion(session)
        names = [*rounds.find_version(session, version).manifest.get("files", ()), MODEL_MANIFEST_FILE]
        limits = rounds.find_evaluation_limits(session, version)  # for both: only results of the same are comparable
    decision = None
    if is_new:
        missing = context.tracker.find_missing_files(version, names)
        if missing:
            raise ChampionRefused(
                f"v{version} cannot be promoted, since the registry lacks {', '.join(missing[:5])}; the retention "
                "policy deletes the weights of old versions: restore it with "
                f"`cotrain register DIR --version {version}`"
            )
        for number in (version, champion):
            if number is not None:
                evaluate_version(context, number, limits=limits)
        with context.sessions.begin() as session:
            decision = registrations.promote_by_gate(session, version, OPERATOR_ACCOUNT_NAME)
            rounds.notify_dispatcher(session)
        log.info("promoted v%d by an operator's request", version)
    publish_outcome(context)
    return OperatorPromotion(version, decision)
