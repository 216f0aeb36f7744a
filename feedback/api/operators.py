"""Routes of operators: accounts, rounds, and withdrawals."""

from fastapi import APIRouter, Depends

from feedback import datasets, report_records, rounds
from feedback.accounts import add_contributor, audit, find_account
from feedback.api.access import (
    AccountRoute,
    CurrentContributor,
    CurrentOperator,
    IdempotentRequestDep,
    RecordIdPath,
    RoundIdPath,
    VersionPath,
    require_known_query,
)
from feedback.api.errors import document_errors
from feedback.api.transactions import SessionDep
from feedback.contracts import (
    AccountWithdrawalIn,
    AccountWithdrawalOut,
    ContributorIn,
    ContributorOut,
    DatasetOut,
    FeedbackOut,
    RoundOut,
    RoundParameters,
    VersionOut,
    WithdrawalIn,
)
from feedback.registrations import describe_version
from feedback.states import RoundState
from feedback.withdrawal import WITHDRAWAL_BATCH_SIZES, withdraw_account, withdraw_dataset, withdraw_report

router = APIRouter(
    prefix="/api/v1",
    tags=["operate"],
    route_class=AccountRoute,
    dependencies=[Depends(require_known_query)],
    responses=document_errors(403),
)


@router.post("/contributors", status_code=201, responses=document_errors(409))
def make_contributor(form: ContributorIn, operator: CurrentOperator, session: SessionDep) -> ContributorOut:
    """Create an account; its token is shown only once."""
    account = add_contributor(session, form.name)
    contributor = account.contributor
    audit(session, operator.id, "contributor added", contributor.id)
    return ContributorOut(id=contributor.id, name=contributor.name, token=account.token)


@router.post("/contributors/withdraw", responses=document_errors(404))
def withdraw_all(form: AccountWithdrawalIn, operator: CurrentOperator, session: SessionDep) -> AccountWithdrawalOut:
    """Withdraw a batch of an account's reports or datasets, oldest first; repeat until both numbers are 0."""
    account = find_account(session, form.account)
    batch = withdraw_account(
        session, operator, account, form.reason, [form.kind] if form.kind else [*WITHDRAWAL_BATCH_SIZES]
    )
    return AccountWithdrawalOut(account=account.id, name=account.name, reports=batch.reports, datasets=batch.datasets)


@router.post("/rounds", status_code=201, responses=document_errors(409))
def start_round(
    form: RoundParameters, operator: CurrentOperator, session: SessionDep, repeat: IdempotentRequestDep
) -> RoundOut:
    """Request a round; the dispatcher starts its flow."""
    claimed = repeat.claim(session, operator.id)
    if claimed.is_repeat:
        training_round = rounds.find_round(session, claimed.id)
    else:
        training_round = rounds.request_round(session, operator.id, form, claimed.id)
    return rounds.describe_round(session, training_round)


@router.get("/rounds/{round_id}", responses=document_errors(404))
def get_round(round_id: RoundIdPath, operator: CurrentOperator, session: SessionDep) -> RoundOut:
    """Return one round by id, or the newest one by `latest`."""
    return rounds.describe_round(session, rounds.find_round(session, round_id))


@router.post("/rounds/{round_id}/cancel", responses=document_errors(404))
def cancel_round(round_id: RoundIdPath, operator: CurrentOperator, session: SessionDep) -> RoundOut:
    """Cancel a running round; its training ends within seconds."""
    training_round = rounds.find_round(session, round_id)
    rounds.finish_round(session, training_round.id, RoundState.CANCELLED, "cancelled by an operator", actor=operator.id)
    rounds.notify_dispatcher(session)
    return rounds.describe_round(session, training_round)


@router.get("/versions/{version}", responses=document_errors(404))
def get_version(version: VersionPath, operator: CurrentOperator, session: SessionDep) -> VersionOut:
    """Return a version's lineage: the round that trained it, or source, licence and digest of its weights."""
    return describe_version(session, version)


@router.post("/feedback/{feedback_id}/withdraw", responses=document_errors(404))
def withdraw_feedback(
    feedback_id: RecordIdPath, form: WithdrawalIn, actor: CurrentContributor, session: SessionDep
) -> FeedbackOut:
    """Withdraw one of your reports, or any as an operator: no more training, tests or notices; the record stays."""
    return report_records.describe_report(session, withdraw_report(session, actor, feedback_id, form.reason))


@router.post("/datasets/{dataset_id}/withdraw", responses=document_errors(404))
def withdraw_rows(
    dataset_id: RecordIdPath, form: WithdrawalIn, actor: CurrentContributor, session: SessionDep
) -> DatasetOut:
    """Withdraw one of your datasets, or any as an operator: no more training or tests; the record stays."""
    return datasets.describe_dataset(session, withdraw_dataset(session, actor, dataset_id, form.reason))
