"""Routes of operators: accounts, rounds, and what is withdrawn."""

from fastapi import APIRouter, Depends

from feedback import datasets, reports, rounds
from feedback.accounts import add_contributor, audit, find_account
from feedback.api.access import Current, Db, Operator, RecordId, Repeatable, RoundId, StrictRoute, known_query
from feedback.api.errors import documented
from feedback.contracts import (
    AccountWithdrawalIn,
    AccountWithdrawalOut,
    ContributorIn,
    ContributorOut,
    DatasetOut,
    FeedbackOut,
    RoundOut,
    RoundParameters,
    WithdrawalIn,
)
from feedback.withdrawal import BATCHES, withdraw_account, withdraw_dataset, withdraw_report

router = APIRouter(
    prefix="/api/v1",
    tags=["operate"],
    route_class=StrictRoute,
    dependencies=[Depends(known_query)],
    responses=documented(403),
)


@router.post("/contributors", status_code=201, responses=documented(409))
def make_contributor(form: ContributorIn, operator: Operator, session: Db) -> ContributorOut:
    """Make an account; its token is shown this once."""
    contributor, token = add_contributor(session, form.name)
    audit(session, operator.id, "contributor added", contributor.id)
    return ContributorOut(id=contributor.id, name=contributor.name, token=token)


@router.post("/contributors/withdraw", responses=documented(404))
def withdraw_all(form: AccountWithdrawalIn, operator: Operator, session: Db) -> AccountWithdrawalOut:
    """Withdraw an account's reports and datasets, a batch at each request, oldest first, until none is left."""
    account = find_account(session, form.account)
    batch = withdraw_account(session, operator, account, form.reason, [form.kind] if form.kind else [*BATCHES])
    return AccountWithdrawalOut(account=account.id, name=account.name, reports=batch.reports, datasets=batch.datasets)


@router.post("/rounds", status_code=201, responses=documented(409))
def start_round(form: RoundParameters, operator: Operator, session: Db, repeat: Repeatable) -> RoundOut:
    """Request a round; the dispatcher starts its flow."""
    round_id, seen = repeat.claim(session, operator)
    turn = rounds.find_round(session, round_id) if seen else rounds.request_round(session, operator.id, form, round_id)
    return rounds.describe(session, turn)


@router.get("/rounds/{round_id}", responses=documented(404))
def get_round(round_id: RoundId, operator: Operator, session: Db) -> RoundOut:
    """One round, or the newest as `latest`."""
    return rounds.describe(session, rounds.find_round(session, round_id))


@router.post("/rounds/{round_id}/cancel", responses=documented(404))
def cancel_round(round_id: RoundId, operator: Operator, session: Db) -> RoundOut:
    """Cancel a running round; its training ends within seconds."""
    turn = rounds.find_round(session, round_id)
    rounds.finish(session, turn.id, "cancelled", "cancelled by an operator", actor=operator.id)
    rounds.notify(session)
    return rounds.describe(session, turn)


@router.post("/feedback/{feedback_id}/withdraw", responses=documented(404))
def withdraw_feedback(feedback_id: RecordId, form: WithdrawalIn, who: Current, session: Db) -> FeedbackOut:
    """Withdraw a report of yours, or any as an operator: it leaves training, tests and notices, and stays on record."""
    return reports.describe(session, withdraw_report(session, who, feedback_id, form.reason))


@router.post("/datasets/{dataset_id}/withdraw", responses=documented(404))
def withdraw_rows(dataset_id: RecordId, form: WithdrawalIn, who: Current, session: Db) -> DatasetOut:
    """Withdraw a dataset of yours, or any as an operator: its rows leave training and tests, and it stays on record."""
    return datasets.describe(session, withdraw_dataset(session, who, dataset_id, form.reason))
