"""Promotion by an operator's request: the rules of a round, refusals, and everything that follows a promotion."""

import pytest
from sqlalchemy import select

from feedback import registrations, rounds
from feedback.accounts import add_contributor
from feedback.contracts import RoundParameters, SmokeTest, WeightsProvenance
from feedback.promotion import reconcile_aliases
from feedback.registrations import ChampionRefused
from feedback.rounds import VersionNotRegistered
from feedback.states import RoundState
from feedback.tables import AuditEvent, Outbox, Promotion, new_id
from tests.feedback.loop import accept_all, promote, record_results, submit
from yuan.model.model_manifest import ModelManifest


def add_version(session, version, smoke_test):
    """Record a version of weights from elsewhere, as if it was registered."""
    provenance = WeightsProvenance(
        source=None, licence=None, digest="0" * 64, folder="/w", dtype="bf16", stored_dtype="bf16"
    )
    registrations.add_registered_version(session, version, ModelManifest({}, {}), f"key-{version}", provenance, "o")
    session.flush()
    if smoke_test is not None:
        registrations.record_smoke_test(session, version, smoke_test)


def test_operator_promotes_by_the_gate_only_what_has_answered_and_no_round_runs(session, later):
    reporter = add_contributor(session, new_id()).contributor
    cases = [submit(session, reporter, f"prompt {number}", "7") for number in range(20)]
    accept_all(session, later, share=1.0)
    case_ids = [report.case_id for report in cases]
    promote(session, 71, passed=case_ids[:10])
    for version, smoke_test in ((81, None), (82, SmokeTest(answer="2")), (83, SmokeTest(answer="2"))):
        add_version(session, version, smoke_test)
        record_results(session, version, passed=case_ids[5:] if version == 82 else case_ids)
    with pytest.raises(VersionNotRegistered, match="v84 was never registered here"):
        registrations.promote_by_gate(session, 84, "operator")
    with pytest.raises(ChampionRefused, match=r"v81 is not smoke-tested \(it was not run\)"):
        registrations.promote_by_gate(session, 81, "operator")
    with pytest.raises(ChampionRefused, match="v82 does not pass the gate, and v71 stays the champion: reports that"):
        registrations.promote_by_gate(session, 82, "operator")
    training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
    with pytest.raises(ChampionRefused, match=f"v83 cannot be promoted while round {training_round.number} runs"):
        registrations.promote_by_gate(session, 83, "operator")
    rounds.finish_round(session, training_round.id, RoundState.CANCELLED, "test")

    decision = registrations.promote_by_gate(session, 83, "operator")
    assert (decision.champion, decision.candidate, decision.reasons) == (71, 83, ())
    assert registrations.promote_by_gate(session, 83, "operator") is None
    newest = session.scalars(select(Promotion).order_by(Promotion.id.desc())).first()
    assert (newest.version, newest.previous, newest.actor) == (83, 71, "operator")
    notices = session.scalars(select(Outbox.text).where(Outbox.version == 83)).all()
    assert notices.count("your report: failing in v71, fixed in v83") == 10
    event = session.scalars(
        select(AuditEvent).where(AuditEvent.subject == "v83", AuditEvent.action == "promoted")
    ).one()
    assert event.detail["decision"]["promote"] and event.detail["previous"] == 71
    aliases = {}
    reconcile_aliases(session, {"champion": 71}, aliases.__setitem__)
    assert (aliases["champion"], aliases["previous"]) == (83, 71)
