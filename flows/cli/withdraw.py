"""`cotrain withdraw report | dataset | account`: what is taken back, by an operator or by who sent it."""

import re
from enum import Enum
from typing import Annotated

import typer

from feedback.client import Client
from flows.cli.contribute import Url, own_portal
from flows.cli.output import Json, clear_errors, show, text_option
from flows.cli.rounds import operator
from yuan.data.text import make_printable


def record_id(text: str) -> str:
    """Refuse what cannot be the id of a record: exit status 2."""
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise typer.BadParameter(f"an id has 32 hexadecimal digits, got {make_printable(text, 60)!r}")
    return text


class Kind(str, Enum):
    """What an account sends."""

    REPORTS = "reports"
    DATASETS = "datasets"


ReportId = Annotated[str, typer.Argument(metavar="ID", help="id of a report", callback=record_id)]
DatasetId = Annotated[str, typer.Argument(metavar="ID", help="id of a dataset", callback=record_id)]
AccountName = Annotated[str, typer.Argument(metavar="NAME_OR_ID", help="a contributor's account", callback=text_option)]
OnlyKind = Annotated[Kind | None, typer.Option(help="only these; default: both", show_default=False)]
Reason = Annotated[str, typer.Option(help="why; it is shown to who sent it", callback=text_option)]
Token = Annotated[
    str,
    typer.Option(
        envvar="COTRAIN_TOKEN", help="your API token; default: this installation's operator", show_default=False
    ),
]

withdraw = typer.Typer(no_args_is_help=True, help="Take a report or a dataset out of training, tests and notices.")


def add_to(app: typer.Typer) -> None:
    app.add_typer(withdraw, name="withdraw")


@withdraw.command()
def report(
    report_id: ReportId,
    reason: Reason,
    url: Url = "",
    token: Token = "",
    as_json: Json = False,
) -> None:
    """Withdraw a report, also from a running round. Doing it twice changes nothing."""
    with clear_errors(), _client(url, token) as client:
        gone = client.withdraw_feedback(report_id, reason)
        show(gone.model_dump(mode="json"), f"report {gone.id} is {gone.state}: {gone.reason}", as_json)


@withdraw.command()
def dataset(
    dataset_id: DatasetId,
    reason: Reason,
    url: Url = "",
    token: Token = "",
    as_json: Json = False,
) -> None:
    """Withdraw a dataset, also from a running round. Doing it twice changes nothing."""
    with clear_errors(), _client(url, token) as client:
        gone = client.withdraw_dataset(dataset_id, reason)
        show(gone.model_dump(mode="json"), f"dataset {gone.id} is {gone.state}: {gone.reason}", as_json)


@withdraw.command()
def account(
    name_or_id: AccountName,
    reason: Reason,
    kind: OnlyKind = None,
    url: Url = "",
    token: Token = "",
    as_json: Json = False,
) -> None:
    """Withdraw everything of an account, also from a running round; operators only. Doing it twice changes nothing."""
    with clear_errors(), _client(url, token) as client:
        gone = client.withdraw_account(name_or_id, reason, kind.value if kind else None)
        text = f"withdrawn of {gone.name} ({gone.account}): {gone.reports:,} reports, {gone.datasets:,} datasets"
        show(gone.model_dump(mode="json"), text, as_json)


def _client(url: str, token: str) -> Client:
    return Client(url or own_portal(), token) if token else operator()
