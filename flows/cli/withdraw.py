"""`cotrain withdraw report | dataset | account`: withdraw feedback, as an operator or as its contributor."""

import re
from enum import Enum
from typing import Annotated

import typer

from feedback.client import Client
from feedback.contracts import AccountReference, WithdrawalReason
from flows.cli.contribute import PortalUrlOption, find_portal_url, open_client
from flows.cli.output import JsonOption, make_option_check, show
from flows.cli.rounds import open_operator_client
from yuan.config import format_count
from yuan.data.text import make_printable


def check_record_id(text: str) -> str:
    """Reject a malformed record id: exit status 2."""
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise typer.BadParameter(f"an id must have 32 hexadecimal digits, got {make_printable(text, 60)!r}")
    return text


class WithdrawalKind(str, Enum):
    """Kinds of records that an account sends."""

    REPORTS = "reports"
    DATASETS = "datasets"


ReportIdArgument = Annotated[str, typer.Argument(metavar="ID", help="id of a report", callback=check_record_id)]
DatasetIdArgument = Annotated[str, typer.Argument(metavar="ID", help="id of a dataset", callback=check_record_id)]
AccountNameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME_OR_ID", help="a contributor's account", callback=make_option_check(AccountReference)),
]
WithdrawalKindOption = Annotated[
    WithdrawalKind | None, typer.Option(help="withdraw only this kind; default: both", show_default=False)
]
WithdrawalReasonOption = Annotated[
    str, typer.Option(help="reason; it is shown to the contributor", callback=make_option_check(WithdrawalReason))
]
WithdrawalTokenOption = Annotated[
    str,
    typer.Option(
        envvar="COTRAIN_TOKEN", help="your API token; default: this installation's operator", show_default=False
    ),
]

withdraw = typer.Typer(no_args_is_help=True, help="Remove a report or a dataset from training, tests and notices.")


@withdraw.command()
def report(
    report_id: ReportIdArgument,
    reason: WithdrawalReasonOption,
    url: PortalUrlOption = "",
    token: WithdrawalTokenOption = "",
    as_json: JsonOption = False,
) -> None:
    """Withdraw a report, also from a running round. Idempotent."""
    with _open_client(url, token) as client:
        feedback = client.withdraw_feedback(report_id, reason)
        show(feedback.model_dump(mode="json"), f"report {feedback.id} is {feedback.state}: {feedback.reason}", as_json)


@withdraw.command()
def dataset(
    dataset_id: DatasetIdArgument,
    reason: WithdrawalReasonOption,
    url: PortalUrlOption = "",
    token: WithdrawalTokenOption = "",
    as_json: JsonOption = False,
) -> None:
    """Withdraw a dataset, also from a running round. Idempotent."""
    with _open_client(url, token) as client:
        withdrawn = client.withdraw_dataset(dataset_id, reason)
        text = f"dataset {withdrawn.id} is {withdrawn.state}: {withdrawn.reason}"
        show(withdrawn.model_dump(mode="json"), text, as_json)


@withdraw.command()
def account(
    name_or_id: AccountNameArgument,
    reason: WithdrawalReasonOption,
    kind: WithdrawalKindOption = None,
    url: PortalUrlOption = "",
    token: WithdrawalTokenOption = "",
    as_json: JsonOption = False,
) -> None:
    """Withdraw all records of an account, also from a running round; operators only. Idempotent."""
    with _open_client(url, token) as client:
        counts = client.withdraw_account(name_or_id, reason, kind.value if kind else None)
        records = f"{format_count(counts.reports, 'report')}, {format_count(counts.datasets, 'dataset')}"
        text = f"withdrawn of {counts.name} ({counts.account}): {records}"
        show(counts.model_dump(mode="json"), text, as_json)


def _open_client(url: str, token: str) -> Client:
    return open_client(url or find_portal_url(), token) if token else open_operator_client(url)
