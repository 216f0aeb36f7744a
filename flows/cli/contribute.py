"""`cotrain submit`, `cotrain dataset push` and `show`: send reports and datasets. They need no local stack."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from feedback.client import Client
from feedback.contracts import DatasetName, DatasetOut, FeedbackIn, IdempotencyKeyText
from feedback.part_sender import PushProgress, PushStage, ReportPushProgress
from feedback.portal_address import check_portal_url
from feedback.states import DatasetPurpose, DatasetState
from flows.cli.output import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    JsonOption,
    build_form,
    fail,
    make_option_check,
    name_options,
    parse_json_option,
    read_version_option,
    show,
    stderr_console,
)
from yuan.config import FieldError, format_count

PORTAL_URL_VARIABLE = "COTRAIN_PORTAL_URL"


def check_url_option(url: str) -> str:
    """Reject an address at which no portal can be: exit status 2."""
    if url:
        try:
            check_portal_url(url)
        except FieldError as error:
            raise typer.BadParameter(error.rule) from None
    return url


PortalUrlOption = Annotated[
    str,
    typer.Option(
        envvar=PORTAL_URL_VARIABLE,
        callback=check_url_option,
        help="URL of the portal; default: that of this installation, else port 8800 on this machine",
        show_default=False,
    ),
]
ContributorTokenOption = Annotated[str, typer.Option(envvar="COTRAIN_TOKEN", help="your API token", show_default=False)]
IdempotencyKeyOption = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key",
        help="retry a request safely with the same key",
        callback=make_option_check(IdempotencyKeyText),
    ),
]
DEFAULT_PORTAL_URL = "http://127.0.0.1:8800"

dataset = typer.Typer(no_args_is_help=True, help="Contribute datasets.")


def submit(
    prompt: Annotated[str, typer.Option(help="prompt that the model was given")],
    response: Annotated[str, typer.Option(help="response of the model")],
    model_version: Annotated[str, typer.Option(help="version that responded, as 7 or v7")],
    expected: Annotated[str | None, typer.Option(help="the correct answer, for a correction")] = None,
    kind: Annotated[str, typer.Option(help="correction, preference, problem or rating")] = "correction",
    checker: Annotated[str | None, typer.Option(help='JSON of a checker, e.g. {"type": "numeric", "value": 7}')] = None,
    chosen: Annotated[str | None, typer.Option(help="the better response, for a preference")] = None,
    rejected: Annotated[str | None, typer.Option(help="the worse response, for a preference")] = None,
    rating: Annotated[int | None, typer.Option(help="1 to 5, for a rating")] = None,
    response_id: Annotated[str | None, typer.Option(help="id of the response from /v1")] = None,
    url: PortalUrlOption = "",
    token: ContributorTokenOption = "",
    idempotency_key: IdempotencyKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report a response. Once accepted, it becomes a test case for every later model."""
    fields: dict[str, Any] = {
        "kind": kind,
        "prompt": prompt,
        "response": response,
        "model_version": read_version_option("--model-version", model_version),
        "expected": expected,
        "chosen": chosen,
        "rejected": rejected,
        "rating": rating,
        "response_id": response_id,
    }
    if checker is not None:
        fields["checker"] = parse_json_option("--checker", checker)
    report = build_form(FeedbackIn, fields)
    url = url or find_portal_url()
    with open_client(url, token) as client:
        feedback = client.submit(report, idempotency_key=idempotency_key)
        text = f"report {feedback.id} is {feedback.state}; follow it at {url}/api/v1/feedback/{feedback.id}"
        show(feedback.model_dump(mode="json"), text, as_json)


@dataset.command()
def push(
    file: Annotated[
        Path, typer.Argument(help="JSONL, one row per line: prompt, answer, checker?, ...", exists=True, dir_okay=False)
    ],
    name: Annotated[
        str | None,
        typer.Option(help="name of the dataset; default: the file name", callback=make_option_check(DatasetName)),
    ] = None,
    purpose: Annotated[
        DatasetPurpose, typer.Option(help="base and suite need an operator's token")
    ] = DatasetPurpose.MIXTURE,
    url: PortalUrlOption = "",
    token: ContributorTokenOption = "",
    idempotency_key: IdempotencyKeyOption = None,
    wait: Annotated[
        bool, typer.Option(help="wait for the check of a file that is sent in parts, that is of more than 16 MiB")
    ] = True,
    max_mb_per_s: Annotated[
        float | None,
        typer.Option(min=0.1, max=100_000, help="limit of the rate at which parts are sent; default: none"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a dataset. A malformed row makes the portal reject the file and list each such row with its reason.

    A large file is sent in parts; if that is interrupted, the same command sends the rest.
    """
    if not file.is_file():
        raise fail(f"a dataset must be a regular file, got {file}; write it to a regular file first", EXIT_USAGE)
    url = url or find_portal_url()
    with open_client(url, token) as client, show_push_progress() as report_progress:
        try:
            pushed = client.push_dataset(
                file,
                name=name,
                purpose=purpose,
                idempotency_key=idempotency_key,
                wait=wait,
                max_bytes_per_s=None if max_mb_per_s is None else max_mb_per_s * 1e6,
                report_progress=report_progress,
            )
        except KeyboardInterrupt:
            raise fail(
                "interrupted; the same command continues, and sends only what has not arrived", EXIT_INTERRUPTED
            ) from None
    show(pushed.model_dump(mode="json"), _describe_pushed(pushed), as_json)


@dataset.command("show")
def show_dataset(
    dataset_id: Annotated[str, typer.Argument(metavar="ID", help="as `dataset push` printed it")],
    url: PortalUrlOption = "",
    token: ContributorTokenOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show the state of one of your datasets, what has arrived and is checked, and its timeline."""
    with open_client(url or find_portal_url(), token) as client:
        dataset = client.dataset(dataset_id)
    lines = [_describe_dataset(dataset), *(f"{event.at:%Y-%m-%d %H:%M:%S}  {event.text}" for event in dataset.timeline)]
    show(dataset.model_dump(mode="json"), "\n".join(lines), as_json)


def _describe_dataset(dataset: DatasetOut) -> str:
    details = [
        format_count(dataset.num_rows, "row") if dataset.num_rows else "",
        format_count(dataset.num_duplicates, "duplicate") if dataset.num_duplicates else "",
        dataset.progress or "",
        dataset.reason or "",
    ]
    state = f"dataset {dataset.id} ({dataset.name}) is {dataset.state}"
    return "; ".join([state, *filter(None, details)])


def _describe_pushed(dataset: DatasetOut) -> str:
    if dataset.state in (DatasetState.UPLOADING, DatasetState.CHECKING):
        size = format_count(dataset.num_bytes, "byte")
        return (
            f"dataset {dataset.id} is {dataset.state} with {size}; follow it with `cotrain dataset show {dataset.id}`"
        )
    return f"dataset {dataset.id} is {dataset.state} with {format_count(dataset.num_rows, 'row')}" + (
        "; the next round processes it" if dataset.state == DatasetState.CHECKED else ""
    )


@contextmanager
def show_push_progress() -> Iterator[ReportPushProgress]:
    """Show a bar for each stage of a push on stderr while the block runs, if it is a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console, disable=not stderr_console.is_terminal) as bars:
        bar_by_stage: dict[PushStage, TaskID] = {}

        def report(progress: PushProgress) -> None:
            if progress.stage not in bar_by_stage:
                bar_by_stage[progress.stage] = bars.add_task(progress.stage, total=progress.num_bytes)
            bars.update(bar_by_stage[progress.stage], completed=progress.num_done)

        yield report


def open_client(url: str, token: str) -> Client:
    """Return a client with a contributor's token; a token that cannot be sent gives status 2."""
    with name_options():
        return Client(url, token)


def find_portal_url() -> str:
    """Return the URL of the portal of this home folder; reads the file directly, without the platform's packages.

    Raises:
        ValueError: if the file has an address at which no portal can be.
    """
    file = Path(os.environ.get("COTRAIN_HOME", ".cotrain")) / "env"
    try:
        lines = file.read_text().splitlines() if file.is_file() else []  # a FIFO would block
    except OSError:
        return DEFAULT_PORTAL_URL
    for line in lines:
        name, _, url = line.partition("=")
        url = url.strip("\"' ")  # as the settings read it
        if name == PORTAL_URL_VARIABLE:
            try:
                check_portal_url(url)
            except FieldError as error:
                raise ValueError(f"{PORTAL_URL_VARIABLE} in {file} {error.rule}, or use --url") from None
            return url
    return DEFAULT_PORTAL_URL
