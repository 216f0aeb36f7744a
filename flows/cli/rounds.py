"""`cotrain round start | status | cancel`: commands for operators to control training rounds."""

import re
import time
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from feedback.client import Client
from feedback.contracts import RoundOut, RoundParameters
from feedback.promotion_decision import PromotionDecision
from feedback.round_steps import RoundStep
from feedback.states import RoundState
from flows.cli.field_options import add_field_options, parse_fields
from flows.cli.output import EXIT_FAILED, JsonOption, build_form, show, stderr_console
from flows.cli.recipe_options import ReplaceOption, parse_replacements
from flows.supervisor.status_line import describe_status
from yuan.config import format_count
from yuan.data.text import make_printable

ROUND_POLL_S = 0.5
MAX_SHOWN_REPORTS = 5  # per account; --json has twenty
ENDED_WITHOUT_PROMOTION = (RoundState.FAILED, RoundState.CANCELLED, RoundState.REJECTED)


def check_round_id(value: str) -> str:
    """Reject a malformed round id, since it becomes part of a URL: exit status 2."""
    if not re.fullmatch("[0-9a-f]{32}|latest", value):
        raise typer.BadParameter(f"must be an id of 32 hexadecimal digits or latest, got {make_printable(value)!r}")
    return value


RoundIdArgument = Annotated[str, typer.Argument(help="id of a round, or latest", callback=check_round_id)]

round_ = typer.Typer(no_args_is_help=True, help="Start, show and cancel training rounds.")


@round_.command()
@add_field_options(RoundParameters, exclude=("overrides",))
def start(
    replace: ReplaceOption = None,
    wait: Annotated[bool, typer.Option(help="follow the round until it ends")] = True,
    as_json: JsonOption = False,
    **fields: Any,
) -> None:
    """Start a round and follow it. Ctrl-C stops following, not the round."""
    values = {**parse_fields(RoundParameters, fields), "overrides": parse_replacements(replace or ())}
    parameters = build_form(RoundParameters, values)
    with open_operator_client() as client:
        _check_recipe(parameters)
        training_round = client.start_round(parameters)
        if wait:
            training_round = follow_round(client, training_round.id)
        _show_round(training_round, as_json)


@round_.command()
def status(
    round_id: RoundIdArgument = "latest",
    as_json: JsonOption = False,
) -> None:
    """Show a round."""
    with open_operator_client() as client:
        _show_round(client.round(round_id), as_json)


@round_.command()
def cancel(
    round_id: RoundIdArgument = "latest",
    as_json: JsonOption = False,
) -> None:
    """Cancel a running round and its training."""
    with open_operator_client() as client:
        _show_round(client.cancel_round(client.round(round_id).id), as_json, expected_state=RoundState.CANCELLED)


def _check_recipe(parameters: RoundParameters) -> None:
    """Reject a recipe that the round could not follow: exit status 2. For recipes that are on this machine alone."""
    from flows.recipe_files import load_recipe
    from infra.settings import Settings, get_variable_name, load_settings, parse_variable_file

    settings = load_settings(Settings)
    stack_values = {line.key: line.value for line in parse_variable_file(settings.home / "env")}
    if parameters.recipe is None or stack_values.get(get_variable_name("portal_url")) != settings.portal_url:
        return
    try:
        parameters.apply_to(load_recipe(settings.home, parameters.recipe), parameters.recipe)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=["--recipe"]) from None


def open_operator_client(url: str = "") -> Client:
    """Return a client with the operator's token from this installation's settings.

    Args:
        url: an option `--url`; the token is sent to no other portal than this installation's.
    """
    # Imported here, since a contributor, who uses `withdraw` with a token, need not install the settings' library.
    from infra.settings import Settings, load_settings

    settings = load_settings(Settings)
    if url not in ("", settings.portal_url):
        rule = f"must be {settings.portal_url}, the portal of this installation's operator, got {url!r}; pass a --token"
        raise typer.BadParameter(rule, param_hint=["--url"])
    return Client(settings.portal_url, settings.operator_token.get_secret_value())


def follow_round(client: Client, round_id: str) -> RoundOut:
    """Show a round's steps and training progress until it ends, and return it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr_console, transient=True) as progress:
        bar = progress.add_task("round", total=None, facts="")
        while True:
            training_round = client.round(round_id)
            if training_round.state != RoundState.RUNNING:
                return training_round
            facts = training_round.activity or ""
            if training_round.step == RoundStep.TRAIN and training_round.status:
                run_status = training_round.status
                progress.update(bar, total=run_status.max_steps, completed=run_status.step)
                facts = describe_status(run_status)
            progress.update(bar, description=f"round {training_round.number}: {training_round.step}", facts=facts)
            time.sleep(ROUND_POLL_S)


def describe_regressions(decision: PromotionDecision) -> list[str]:
    """Describe the accounts whose reports fail again, one line per account, and what the operator can do."""
    lines = []
    for account in decision.regressions_by_account:
        shown_reports = account.reports[:MAX_SHOWN_REPORTS]
        ellipsis = ", ..." if len(account.reports) > len(shown_reports) else ""
        gained = f"{account.num_gained} earlier ones pass now (p = {account.p_value:.2g})"
        fails = f"{format_count(account.num_lost, 'report')} {'fails' if account.num_lost == 1 else 'fail'}"
        weight = "" if account.is_significant else ", which may be chance and does not count"
        change = f"{fails} again, {gained}{weight}"
        lines.append(f"  {account.name}: {change}: {', '.join(shown_reports)}{ellipsis}")
    if lines and not decision.regressions_may_be_chance:
        lines.append("  if the reports of an account are invalid: cotrain withdraw account NAME --reason TEXT")
    return lines


def _show_round(training_round: RoundOut, as_json: bool, expected_state: RoundState = RoundState.PROMOTED) -> None:
    """Show a round; the exit status is 1 if it ended in another state than the expected one."""
    recipe = f", recipe {training_round.recipe}," if training_round.recipe else ""
    text = f"round {training_round.number} ({training_round.id}){recipe} is {training_round.state}"
    if training_round.state == RoundState.RUNNING:
        text += f" at {training_round.step}"
    elif training_round.reason:
        text += f": {training_round.reason}"
    if training_round.started_from:
        text += f"; training started from {training_round.started_from}"
    if training_round.repeated_verdicts is not None:
        text += f"; {training_round.repeated_verdicts.describe()}"
    failed = sum(training_round.failed_items.values())
    text += f"; {format_count(failed, 'item')} could not be processed, see failed_items with --json" if failed else ""
    if training_round.decision is not None:
        text = "\n".join([text, *describe_regressions(training_round.decision)])
    show(training_round.model_dump(mode="json"), text, as_json)
    if training_round.state in ENDED_WITHOUT_PROMOTION and training_round.state != expected_state:
        raise typer.Exit(EXIT_FAILED)
