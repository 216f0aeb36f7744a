"""Versions of weights that no round trained: provenance and smoke test; champions by an operator's request."""

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from feedback.accounts import NotFound, audit
from feedback.contracts import SmokeTest, VersionOut, WeightsProvenance
from feedback.gate import compare_versions
from feedback.promotion import find_champion, make_champion
from feedback.promotion_decision import PromotionDecision
from feedback.rounds import VersionNotRegistered, find_running_round, find_version
from feedback.tables import ModelVersion, Promotion, Round
from infra.error_text import SafeMessageError
from yuan.model.model_manifest import ModelManifest

STEP_ACTION = "registration step begun"
UNSTATED_DTYPE = "fp32"  # of manifests of earlier releases, which do not state it


class ChampionRefused(SafeMessageError, ValueError):
    """A version cannot become the champion by its registration; the message says why and what to do."""


def find_registered_version(session: Session, registration_key: str) -> ModelVersion | None:
    """Return the version of weights from elsewhere, by the key of their registration; None if there is none."""
    return session.scalar(select(ModelVersion).where(ModelVersion.registration_key == registration_key))


def add_registered_version(
    session: Session,
    version: int,
    manifest: ModelManifest,
    registration_key: str,
    provenance: WeightsProvenance,
    actor: str,
) -> None:
    """Record a version whose files are complete in the registry; a repeated call changes nothing."""
    if session.get(ModelVersion, version) is not None:
        return
    session.add(
        ModelVersion(
            version=version,
            manifest=manifest.to_json(),
            registration_key=registration_key,
            provenance=provenance.model_dump(),
        )
    )
    audit(session, actor, "version registered", f"v{version}", **provenance.model_dump())


def record_smoke_test(session: Session, version: int, smoke_test: SmokeTest) -> None:
    """Store the result of a version's smoke test; a passed one is kept."""
    record = find_version(session, version)
    if record.smoke_test is None or not SmokeTest.model_validate(record.smoke_test).passed:
        record.smoke_test = smoke_test.model_dump()


def check_champion_is_free(session: Session) -> None:
    """Check that a version may become the champion by its registration: there is none, and no round is running.

    Raises:
        ChampionRefused: if it may not.
    """
    champion = find_champion(session)
    if champion is not None:
        raise ChampionRefused(
            f"--champion is for the first champion, and v{champion} is the champion; register without it, then let the "
            "gate decide with `cotrain promote VERSION`"
        )
    running = find_running_round(session)
    if running is not None:
        raise ChampionRefused(
            f"--champion is not possible while round {running.number} runs, whose version would replace the champion "
            "without a comparison; wait for its end, or cancel it with `cotrain round cancel`"
        )


def make_first_champion(session: Session, version: int, actor: str) -> None:
    """Make a registered version the champion, by an operator's decision, and write the notices for accepted reports.

    All of it is in the caller's transaction. A repeated call changes nothing.

    Raises:
        ChampionRefused: if there is another champion, a round is running, or its smoke test has not passed.
    """
    _lock_promotions(session)
    if find_champion(session) == version:
        return
    check_champion_is_free(session)
    check_smoke_test(session, version)
    make_champion(session, version, None, actor=actor, reason="registered as the first champion")


def check_promotable(session: Session, version: int) -> bool:
    """Check that an operator may promote a version, but for the gate; return False if it is the champion already.

    Raises:
        VersionNotRegistered: if there never was such a version.
        ChampionRefused: if a round is running, or its smoke test has not passed.
    """
    find_version(session, version)
    if find_champion(session) == version:
        return False
    running = find_running_round(session)
    if running is not None:
        raise ChampionRefused(
            f"v{version} cannot be promoted while round {running.number} runs, which compares its version with the "
            "present champion; wait for its end, or cancel it with `cotrain round cancel`"
        )
    check_smoke_test(session, version)
    return True


def promote_by_gate(session: Session, version: int, actor: str) -> PromotionDecision | None:
    """Make a version the champion by an operator's request if it passes the gate, by the results that are stored.

    The rules are those of a round: the first champion is compared with nothing. Promotion, verdicts, notices and audit
    are in the caller's transaction. A repeated call changes nothing.

    Returns:
        The gate's decision; None if it is the champion already.

    Raises:
        ChampionRefused: if `check_promotable` or the gate refuses it; the message has the reasons.
    """
    _lock_promotions(session)
    if not check_promotable(session, version):
        return None
    champion = find_champion(session)
    decision = compare_versions(session, champion, version)
    if not decision.promote:
        raise ChampionRefused(
            f"v{version} does not pass the gate, and v{champion} stays the champion: {'; '.join(decision.reasons)}"
        )
    reason = "first version" if champion is None else "passed the gate"
    make_champion(session, version, champion, actor=actor, reason=f"{reason}, by an operator", decision=decision)
    return decision


def check_smoke_test(session: Session, version: int) -> None:
    """Check that a version of weights from elsewhere has given an answer; one that a round trained is evaluated.

    Raises:
        ChampionRefused: if it has not.
    """
    record = find_version(session, version)
    smoke_test = SmokeTest.model_validate(record.smoke_test or {"reason": "it was not run"})
    if record.round_id is None and not smoke_test.passed:
        raise ChampionRefused(
            f"v{version} is not smoke-tested ({smoke_test.reason}), so it cannot become the champion; register it "
            "again on a machine that can load it"
        )


def _lock_promotions(session: Session) -> None:
    """Keep other transactions from beginning a round or promoting a version until this one ends."""
    session.execute(text(f'lock table "{Round.__tablename__}", {Promotion.__tablename__} in share row exclusive mode'))


def audit_step(session: Session, actor: str, registration_key: str, step: str) -> None:
    """Record that a step of a registration begins."""
    audit(session, actor, STEP_ACTION, registration_key, step=step)


def describe_version(session: Session, version: int) -> VersionOut:
    """Build a version's lineage record.

    Raises:
        NotFound: if there never was such a version.
    """
    try:
        record = find_version(session, version)
    except VersionNotRegistered as error:
        raise NotFound(str(error), "version") from None
    training_round = None if record.round_id is None else session.get_one(Round, record.round_id)
    manifest = record.manifest
    promoted = select(Promotion.created_at).where(Promotion.version == version).order_by(Promotion.id.desc()).limit(1)
    return VersionOut(
        version=version,
        round=None if training_round is None else training_round.number,
        round_id=record.round_id,
        run_id=record.run_id,
        parent=manifest.get("parent"),
        snapshot_id=manifest.get("snapshot"),
        dtype=manifest.get("dtype", UNSTATED_DTYPE),
        files=manifest.get("files", {}),
        provenance=record.provenance,
        smoke_test=record.smoke_test,
        is_champion=find_champion(session) == version,
        promoted_at=session.scalar(promoted),
        created_at=record.created_at,
    )
