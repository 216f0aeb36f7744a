"""Withdrawn reports and datasets: removed from mixture, tests, gate and notices; their records stay."""

from contextlib import ExitStack

import pytest
from sqlalchemy import func, select

from feedback import datasets, gate, promotion, report_records, rounds
from feedback.accounts import InvalidField, NotFound, add_contributor
from feedback.api.app import make_app
from feedback.client import Client, PortalError
from feedback.contracts import FeedbackIn
from feedback.states import RoundState
from feedback.tables import AuditEvent, Case, DatasetRow, Outbox, new_id
from feedback.withdrawal import (
    WITHDRAWAL_BATCH_SIZES,
    WithdrawalBatch,
    withdraw_account,
    withdraw_dataset,
    withdraw_report,
)
from tests.feedback.loop import (
    accept_all,
    add_candidate,
    freeze_mixture,
    is_held_out,
    make_checked_rows,
    promote,
    record_results,
    start_round,
    submit,
    upload,
)
from tests.serving import serve_app


def test_withdrawn_report_is_removed_from_mixture_tests_and_notices(session, objects, reporter, later):
    stays, goes = submit(session, reporter), submit(session, reporter, "Reverse: xyz", "zyx")
    accept_all(session, later, share=0.0)
    withdraw_report(session, reporter, goes.id, "it was mistaken")
    assert b"xyz" not in freeze_mixture(session, objects)[1]
    assert [case.id for case in rounds.find_untested_cases(session, 1)] == [stays.case_id]
    promote(session, 1, passed=[])
    assert session.scalars(select(Outbox.feedback_id)).all() == [stays.id]
    record = report_records.describe_report(session, goes)
    assert (record.state, record.timeline[-1].text) == ("withdrawn", "withdrawn by you: it was mistaken")


def test_withdrawal_and_end_of_a_round_have_times_of_the_database_clock(session, reporter, later):
    report = submit(session, reporter)
    accept_all(session, later)
    withdraw_report(session, reporter, report.id, "mistaken")
    transaction_start, before = session.execute(select(func.now(), func.clock_timestamp())).one()
    withdrawn_at = session.scalars(select(Case.withdrawn_at).where(Case.id == report.case_id)).one()
    assert withdrawn_at == transaction_start
    training_round = start_round(session)
    rounds.finish_round(session, training_round.id, RoundState.FAILED, "test")
    session.flush()
    after = session.scalars(select(func.clock_timestamp())).one()
    assert before < training_round.finished_at < after


def test_report_withdrawn_during_a_round_is_ignored_by_the_gate(session, reporter, later):
    row, other = submit(session, reporter), submit(session, reporter, "Reverse: xyz", "zyx")
    accept_all(session, later, share=1.0)
    promote(session, 1, passed=[row.case_id])
    training_round = start_round(session)
    training_round.parent_version = 1
    add_candidate(session, training_round, 2)
    record_results(session, 2, passed=[])
    assert gate.decide_promotion(session, training_round).regressions == (row.case_id,)
    withdraw_report(session, reporter, row.id, "mistaken")
    decision = gate.decide_promotion(session, training_round)
    assert decision.promote and [suite.after.total for suite in decision.suites] == [1]
    withdraw_report(session, reporter, other.id, "mistaken too")
    assert "no held-out case is left to judge it by" in gate.decide_promotion(session, training_round).reasons[0]


def test_a_case_stays_while_another_accepted_report_shares_it(session, reporter, later):
    first, second = submit(session, reporter), submit(session, reporter)
    accept_all(session, later)
    assert first.case_id == second.case_id
    withdraw_report(session, reporter, first.id, "mine alone")
    assert len(rounds.find_untested_cases(session, 1)) == 1
    withdraw_report(session, reporter, second.id, "mine too")
    assert rounds.find_untested_cases(session, 1) == []
    third = submit(session, reporter)
    accept_all(session, later)
    assert third.case_id == first.case_id and len(rounds.find_untested_cases(session, 1)) == 1


def test_withdrawn_answer_does_not_dispute_later_reports(session, reporter, later):
    wrong = submit(session, reporter, expected="abc")
    accept_all(session, later)
    withdraw_report(session, reporter, wrong.id, "mistaken")
    right = submit(session, reporter)
    accept_all(session, later)
    assert right.state == "accepted"


def test_report_withdrawn_before_review_is_not_accepted(session, reporter, later):
    row = submit(session, reporter)
    withdraw_report(session, reporter, row.id, "too early")
    assert accept_all(session, later).accepted == 0 and row.state == "withdrawn"


def test_pending_notice_of_a_withdrawn_report_is_not_delivered(session, reporter, later):
    row = submit(session, reporter)
    accept_all(session, later)
    promote(session, 1, passed=[])
    withdraw_report(session, reporter, row.id, "mistaken")
    assert promotion.mark_notices_delivered(session) == 0


@pytest.mark.parametrize("is_notified", [False, True])
def test_a_withdrawn_report_has_no_verdict(session, reporter, later, is_notified):
    row = submit(session, reporter)
    accept_all(session, later)
    promote(session, 1, passed=[])
    if is_notified:
        promotion.mark_notices_delivered(session)
    assert report_records.describe_report(session, row).summary == "failing in v1"
    withdraw_report(session, reporter, row.id, "mistaken")
    record = report_records.describe_report(session, row)
    assert (record.summary, record.verdict, record.verdict_version) == ("withdrawn", None, None)
    assert any("failing in v" in event.text for event in record.timeline) is is_notified


def test_withdrawn_dataset_is_removed_from_mixture_and_tests(session, objects, reporter):
    upload(session, objects, reporter, make_checked_rows("stays", 40))
    goes = upload(session, objects, reporter, make_checked_rows("goes", 40))
    assert {case.prompt[:4] for case in rounds.find_untested_cases(session, 1)} == {"stay", "goes"}
    withdraw_dataset(session, reporter, goes.id, "not mine to give")
    assert b"goes" not in freeze_mixture(session, objects)[1]
    assert {case.prompt[:5] for case in rounds.find_untested_cases(session, 1)} == {"stays"}
    assert datasets.describe_dataset(session, goes).timeline[-1].text == "withdrawn by you: not mine to give"


@pytest.mark.parametrize("purpose", ["mixture", "base"])
def test_duplicate_replaces_a_withdrawn_row(session, objects, reporter, purpose):
    rows = make_checked_rows("same", 20)
    num_drawn = sum(map(is_held_out, rows)) if purpose == "mixture" else 0
    first = upload(session, objects, reporter, rows)
    again = upload(session, objects, reporter, make_checked_rows("same", 20), purpose=purpose)
    assert again.num_duplicates == 20
    withdraw_dataset(session, reporter, first.id, "mine alone")
    roles = session.scalars(select(DatasetRow.role).where(DatasetRow.dataset_id == again.id)).all()
    assert (roles.count("held_out"), roles.count("train")) == (num_drawn, 20 - num_drawn)
    assert len(rounds.find_untested_cases(session, 1)) == num_drawn


def test_withdrawing_twice_changes_nothing(session, reporter, later):
    row = submit(session, reporter)
    withdraw_report(session, reporter, row.id, "once")
    withdraw_report(session, reporter, row.id, "twice")
    assert row.reason == "once"
    noted = select(AuditEvent).where(AuditEvent.subject == row.id, AuditEvent.action == "withdrawn")
    assert len(session.scalars(noted).all()) == 1


def test_a_stranger_cannot_withdraw_and_an_operator_can(session, objects, reporter, later):
    row, dataset = submit(session, reporter), upload(session, objects, reporter, make_checked_rows("x", 10))
    stranger = add_contributor(session, new_id()).contributor
    for withdraw, record in ((withdraw_report, row), (withdraw_dataset, dataset)):
        with pytest.raises(NotFound, match=f"you have no .* {record.id}"):
            withdraw(session, stranger, record.id, "envy")
        stranger.role = "operator"
        withdraw(session, stranger, record.id, "poison")
        stranger.role = "contributor"
    assert report_records.describe_report(session, row).timeline[-1].text == "withdrawn by an operator: poison"


def test_account_withdrawal_processes_all_records_in_batches(session, objects, reporter, later):
    stranger, operator = (add_contributor(session, new_id()).contributor for _ in range(2))
    operator.role = "operator"
    rows = [submit(session, stranger, f"junk {n}", "7") for n in range(WITHDRAWAL_BATCH_SIZES["reports"] + 2)]
    refused = rows.pop()
    refused.state, refused.reason = "rejected", "not reproduced"
    accept_all(session, later)
    uploads = [
        upload(session, objects, stranger, make_checked_rows(f"junk{n} ", 5))
        for n in range(WITHDRAWAL_BATCH_SIZES["datasets"] + 1)
    ]
    other = submit(session, reporter, "good", "7")
    batches = []
    while not batches or batches[-1] != WithdrawalBatch():
        assert len(batches) < 9
        batches.append(withdraw_account(session, operator, stranger, "junk", ["reports", "datasets"]))
    assert batches == [
        WithdrawalBatch(200, 0),
        WithdrawalBatch(1, 0),
        WithdrawalBatch(0, 10),
        WithdrawalBatch(0, 1),
        WithdrawalBatch(),
    ]
    assert {row.state for row in (*rows, *uploads)} == {"withdrawn"}
    assert (refused.state, other.state) == ("rejected", "received")
    assert rounds.find_untested_cases(session, 1) == []
    for record in (report_records.describe_report(session, rows[-1]), datasets.describe_dataset(session, uploads[-1])):
        assert record.timeline[-1].text == "withdrawn by an operator: junk"


def test_an_operators_account_is_not_withdrawn_as_a_whole(session, reporter):
    reporter.role = "operator"
    with pytest.raises(InvalidField, match="is an operator's account"):
        withdraw_account(session, reporter, reporter, "a slip", ["datasets"])


def test_the_route_that_withdraws_an_account(stores, engine, objects, first_version, account, operator, tmp_path):
    body = FeedbackIn(kind="correction", prompt="p", response="?", model_version=1, expected="a")
    with ExitStack() as opened:
        url = opened.enter_context(serve_app(make_app(stores, engine, objects)))
        client = opened.enter_context(Client(url, account.token))
        operator_client = opened.enter_context(Client(url, operator["Authorization"].removeprefix("Bearer ")))
        report_ids = [client.submit(body).id for _ in range(3)]
        (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "p", "answer": "a"}')
        dataset = client.push_dataset(tmp_path / "rows.jsonl")
        name = operator_client.withdraw_account(account.id, "junk", "datasets").name
        assert (client.dataset(dataset.id).state, client.feedback(report_ids[0]).state) == ("withdrawn", "received")
        withdrawal = operator_client.withdraw_account(name, "junk")
        assert (withdrawal.account, withdrawal.reports, withdrawal.datasets) == (account.id, 3, 0)
        assert {client.feedback(report_id).reason for report_id in report_ids} == {"junk"}
        again = operator_client.withdraw_account(name, "twice")
        assert (again.reports, again.datasets, client.feedback(report_ids[0]).reason) == (0, 0, "junk")
        with pytest.raises(PortalError, match="404: there is no account with the id or name nobody"):
            operator_client.withdraw_account("nobody", "junk")
        with pytest.raises(PortalError, match="403"):
            client.withdraw_account(name, "mine")


def test_routes_of_withdrawal(portal, account, operator):
    body = FeedbackIn(kind="correction", prompt="p", response="?", model_version=1, expected="a")
    report = portal.post("/api/v1/feedback", json=body.model_dump(exclude_none=True), headers=account.headers).json()
    url = f"/api/v1/feedback/{report['id']}/withdraw"
    assert portal.post(url, json={"reason": ""}, headers=account.headers).status_code == 422
    response = portal.post(url, json={"reason": "poison"}, headers=operator)
    assert (response.status_code, response.json()["state"]) == (200, "withdrawn")
    assert portal.get(f"/api/v1/feedback/{report['id']}", headers=account.headers).json()["reason"] == "poison"
    for kind in ("feedback", "datasets"):
        missing = portal.post(f"/api/v1/{kind}/{new_id()}/withdraw", json={"reason": "r"}, headers=operator)
        assert missing.status_code == 404 and "there is no" in missing.json()["error"]["message"]
