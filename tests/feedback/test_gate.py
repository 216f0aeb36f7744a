"""Promotion gate: when regressions of reports block a candidate, and which accounts the decision names."""

from datetime import timedelta

import pytest
from sqlalchemy import select, update

from feedback import gate, promotion, rounds
from feedback.accounts import add_contributor
from feedback.tables import Case, CaseResult, Feedback, Promotion, Round, new_id
from feedback.withdrawal import withdraw_account, withdraw_report
from flows.cli.rounds import describe_regressions
from flows.recipe_files import load_recipe
from tests.feedback.loop import accept_all, add_candidate, promote, start_round, submit
from yuan.eval.conditions import DEFAULT_CONDITIONS, EvaluationConditions
from yuan.eval.results import EvalResult
from yuan.recipe import DEFAULT_EVALUATION, EvaluationSection


@pytest.fixture
def other_accounts(session):
    return [add_contributor(session, new_id()).contributor for _ in range(2)]


def add_reports(session, contributor, prefix, count, later):
    """Submit and accept reports; return the ids of their cases."""
    rows = [submit(session, contributor, f"{prefix} {n}", "7") for n in range(count)]
    accept_all(session, later)
    return [row.case_id for row in rows]


def test_results_with_other_limits_of_the_answers_are_made_again_and_replaced(session, reporter, later):
    cases = add_reports(session, reporter, "limits", 4, later)
    promote(session, 1, passed=cases)
    longer = EvaluationConditions(EvaluationSection(extra_tokens=512))
    assert rounds.find_untested_cases(session, 1) == rounds.find_untested_cases(session, 1, DEFAULT_CONDITIONS) == []
    assert {case.id for case in rounds.find_untested_cases(session, 1, longer)} == set(cases)

    promotion.store_results(session, 1, [EvalResult(case, "long", False) for case in cases], longer)
    assert rounds.find_untested_cases(session, 1, longer) == []
    assert gate.find_regressions(session, 1, 1) == []  # none passes any longer
    promotion.store_results(session, 1, [EvalResult(case, "again", True) for case in cases], longer)
    answers = session.scalars(select(CaseResult.answer).where(CaseResult.case_id.in_(cases)))
    assert set(answers) == {"long"}  # the same limits keep the first result

    other_devices = EvaluationConditions(device_class="H100-80")
    assert {case.id for case in rounds.find_untested_cases(session, 1, other_devices)} == set(cases)


def test_limits_of_a_version_are_those_of_its_rounds_recipe_or_the_defaults(session, tmp_path):
    training_round = start_round(session)
    add_candidate(session, training_round, 1)
    assert rounds.find_evaluation_limits(session, 1) == DEFAULT_EVALUATION  # a round of a release without recipes
    rounds.get_or_store_recipe(session, training_round.id, "finetune-2b", load_recipe(tmp_path, "finetune-2b"))
    assert rounds.find_evaluation_limits(session, 1).extra_tokens == 512


def test_junk_reports_that_pass_by_chance_do_not_block_candidates(session, other_accounts, reporter, later):
    good = add_reports(session, reporter, "good", 10, later)
    junk = add_reports(session, other_accounts[0], "junk", 160, later)
    promote(session, 1, passed=[])
    assert promote(session, 2, passed=good + junk[:8], parent=1).promote
    decision = promote(session, 3, passed=good + junk[8:15], parent=2)
    assert decision.promote and decision.reasons == ()
    assert sorted(decision.regressions) == sorted(junk[:8]) and decision.regressions_may_be_chance
    (named,) = decision.regressions_by_account
    assert (named.name, named.num_lost, named.num_gained) == (other_accounts[0].name, 8, 7)
    assert len(named.reports) == 8 and named.p_value == pytest.approx(0.5)


@pytest.mark.parametrize("lost", [1, 8])
def test_withdrawing_failing_reports_does_not_block_candidates(session, other_accounts, reporter, later, lost):
    """The remaining reports pass in the champion only because the failing ones were withdrawn."""
    good = add_reports(session, reporter, "good", 10, later)
    junk = add_reports(session, other_accounts[0], "junk", 160, later)
    promote(session, 1, passed=[])
    promote(session, 2, passed=good + junk[:8], parent=1)
    for row in session.scalars(select(Feedback).where(Feedback.case_id.in_(junk[8:]))).all():
        withdraw_report(session, other_accounts[0], row.id, "it fails")
    decision = promote(session, 3, passed=good + junk[lost:8], parent=2)
    assert decision.promote and decision.regressions_may_be_chance
    assert decision.regressions_by_account[0].num_gained == 152


@pytest.mark.parametrize(
    ("total", "lost", "gained", "is_promoted"),
    [(40, 5, 0, False), (40, 4, 0, True), (40, 8, 1, False), (60, 20, 15, True), (1, 1, 0, False), (7, 4, 2, False)],
)
def test_significant_regressions_of_one_account_block_the_candidate(
    session, reporter, later, total, lost, gained, is_promoted
):
    """They always count where the champion passes at least half of the account's reports."""
    cases = add_reports(session, reporter, "good", total, later)
    session.execute(update(Case).where(Case.id.in_(cases)).values(role="held_out"))
    promote(session, 1, passed=[])
    promote(session, 2, passed=cases[:lost], parent=1)
    decision = promote(session, 3, passed=cases[lost : lost + gained], parent=2)
    assert decision.promote is is_promoted is decision.regressions_may_be_chance
    assert promotion.find_champion(session) == (3 if is_promoted else 2)


def test_passing_train_cases_do_not_make_held_out_regressions_significant(session, reporter, later):
    """Half of an account's meaningless reports become train cases, which pass after training."""
    train, held_out = (
        add_reports(session, reporter, "train", 80, later),
        add_reports(session, reporter, "tests", 80, later),
    )
    for cases, role in ((train, "train"), (held_out, "held_out")):
        session.execute(update(Case).where(Case.id.in_(cases)).values(role=role))
    promote(session, 1, passed=[])
    promote(session, 2, passed=train + held_out[:8], parent=1)
    assert promote(session, 3, passed=train + held_out[8:15], parent=2).promote
    decision = promote(session, 4, passed=train[1:] + held_out[8:15], parent=3)
    assert decision.reasons == ("reports that pass in the champion fail again: 1, of 1 account(s)",)


def test_reports_after_the_promotion_do_not_offset_regressions(session, reporter, later):
    old = add_reports(session, reporter, "old", 5, later)
    promote(session, 1, passed=[])
    promote(session, 2, passed=old, parent=1)
    new = add_reports(session, reporter, "new", 20, later)
    promoted = select(Promotion.created_at).where(Promotion.version == 2)
    moment = session.scalars(promoted).one() + timedelta(seconds=1)
    session.execute(update(Case).where(Case.id.in_(new)).values(created_at=moment))
    promotion.store_results(session, 2, [EvalResult(case, "", False) for case in new])
    decision = promote(session, 3, passed=new, parent=2)
    assert not decision.promote and decision.regressions_by_account[0].num_gained == 0


def test_regressions_of_two_accounts_count_each(session, other_accounts, later):
    cases = [add_reports(session, contributor, f"of {contributor.id}", 1, later)[0] for contributor in other_accounts]
    promote(session, 1, passed=[])
    promote(session, 2, passed=cases, parent=1)
    decision = promote(session, 3, passed=[], parent=2)
    assert "reports that pass in the champion fail again: 2, of 2 account(s)" in decision.reasons
    assert {entry.account for entry in decision.regressions_by_account} == {
        contributor.id for contributor in other_accounts
    }


def test_regression_of_a_case_shared_by_two_accounts_blocks_the_candidate(session, other_accounts, later):
    (case,), (same,) = (add_reports(session, contributor, "shared", 1, later) for contributor in other_accounts)
    assert case == same
    promote(session, 1, passed=[])
    promote(session, 2, passed=[case], parent=1)
    assert not promote(session, 3, passed=[], parent=2).promote


def test_regression_of_one_operator_report_blocks_the_candidate(session, reporter, later):
    reporter.role = "operator"
    (case,) = add_reports(session, reporter, "mine", 1, later)
    promote(session, 1, passed=[])
    promote(session, 2, passed=[case], parent=1)
    assert not promote(session, 3, passed=[], parent=2).promote


def test_round_lists_accounts_with_regressions_and_ignores_withdrawn_accounts(session, other_accounts, reporter, later):
    reporter.role = "operator"
    cases = [
        case
        for contributor in other_accounts
        for case in add_reports(session, contributor, f"of {contributor.id}", 30, later)
    ]
    promote(session, 1, passed=[])
    promote(session, 2, passed=cases, parent=1)
    decision = promote(session, 3, passed=[], parent=2)
    assert [len(entry.reports) for entry in decision.regressions_by_account] == [20, 20]
    lines = describe_regressions(decision)
    assert len(lines) == 3 and all(contributor.name in "\n".join(lines[:2]) for contributor in other_accounts)
    assert "30 reports fail again, 0 earlier ones pass now" in lines[0] and "cotrain withdraw account" in lines[2]
    for contributor in other_accounts:
        withdraw_account(session, reporter, contributor, "senseless", ["reports"])
    training_round = session.scalars(select(Round).where(Round.candidate_version == 3)).one()
    assert gate.decide_promotion(session, training_round).regressions == ()
