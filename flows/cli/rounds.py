"""`cotrain round start | status | cancel`: what operators do with rounds."""

import re
import time
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from feedback.client import Client
from feedback.contracts import RoundOut, RoundParameters
from flows.cli.fields import add_field_options, parse_fields
from flows.cli.output import EXIT_FAILED, JsonOption, build_form, explain_errors, show, stderr_console
from flows.supervisor.status_line import describe_status
from yuan.data.text import make_printable

ROUND_POLL_S = 0.5
MAX_SHOWN_REPORTS = 5  # of an account; --json has twenty


def check_round_id(value: str) -> str:
    """Refuse what can be no round's id, since it becomes part of an address: exit status 2."""
    if not re.fullmatch("[0-9a-f]{32}|latest", value):
        raise typer.BadParameter(f"must be an id of 32 hexadecimal digits or latest, got {make_printable(value)!r}")
    return value


RoundIdArgument = Annotated[str, typer.Argument(help="id of a round, or latest", callback=check_round_id)]

round_ = typer.Typer(no_args_is_help=True, help="Rounds: one turn of the loop each.")


def add_commands(app: typer.Typer) -> None:
    app.add_typer(round_, name="round")


@round_.command()
@add_field_options(RoundParameters)
def start(
    wait: Annotated[bool, typer.Option(help="follow the round to its end")] = True,
    as_json: JsonOption = False,
    **fields: Any,
) -> None:
    """Start a round and follow it. Ctrl-C stops following, not the round."""
    wanted = build_form(RoundParameters, parse_fields(RoundParameters, fields))
    with explain_errors(), open_operator_client() as client:
        turn = client.start_round(wanted)
        if wait:
            turn = follow_round(client, turn.id)
        _show_round(turn, as_json)


@round_.command()
def status(
    round_id: RoundIdArgument = "latest",
    as_json: JsonOption = False,
) -> None:
    """Show a round."""
    with explain_errors(), open_operator_client() as client:
        _show_round(client.round(round_id), as_json)


@round_.command()
def cancel(
    round_id: RoundIdArgument = "latest",
    as_json: JsonOption = False,
) -> None:
    """Cancel a running round and its training."""
    with explain_errors(), open_operator_client() as client:
        _show_round(client.cancel_round(client.round(round_id).id), as_json, wanted="cancelled")


def open_operator_client() -> Client:
    """A client with the operator's token of this installation's settings."""
    from infra.settings import Settings, load_settings

    settings = load_settings(Settings)
    return Client(settings.portal_url, settings.operator_token.get_secret_value())


def follow_round(client: Client, round_id: str) -> RoundOut:
    """Show a round's steps and training progress until it ends, and return it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console, transient=True) as progress:
        bar = progress.add_task("round", total=None, facts="")
        while True:
            turn = client.round(round_id)
            if turn.state != "running":
                return turn
            s = turn.status if turn.step == "train" else None
            facts = describe_status(s) if s else ""
            if s:
                progress.update(bar, total=s["max_steps"], completed=s["step"])
            progress.update(bar, description=f"round {turn.number}: {turn.step}", facts=facts)
            time.sleep(ROUND_POLL_S)


def describe_regressions(decision: dict[str, Any]) -> list[str]:
    """Describe whose reports fail again, a line for each account, and what can be done about them."""
    lines = []
    for one in decision.get("regressions_by_account", ()):
        named, count = one["reports"][:MAX_SHOWN_REPORTS], one["regressed"]
        more = ", ..." if len(one["reports"]) > len(named) else ""
        changed = f"{count} reports fail again, {one['gained']} earlier ones pass now (p = {one['p']:.2g})"
        weight = "" if one["counts"] else ", which may be chance and does not count"
        lines.append(f"  {one['name']}: {changed}{weight}: {', '.join(named)}{more}")
    if lines and not decision["regressions_may_be_chance"]:
        lines.append("  if an account's are senseless: cotrain withdraw account NAME --reason TEXT")
    return lines


def _show_round(turn: RoundOut, as_json: bool, wanted: str = "promoted") -> None:
    """Show a round; the exit status is 1 if it ended in another way than the one wanted."""
    text = f"round {turn.number} ({turn.id}) is {turn.state}"
    text += f" at {turn.step}" if turn.state == "running" else f": {turn.reason}"
    failed = sum(turn.failed_items.values())
    text += f"; {failed} items could not be processed, see failed_items with --json" if failed else ""
    show(turn.model_dump(mode="json"), "\n".join([text, *describe_regressions(turn.decision or {})]), as_json)
    if turn.state in ("failed", "cancelled", "rejected") and turn.state != wanted:
        raise typer.Exit(EXIT_FAILED)
