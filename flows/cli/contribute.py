"""`cotrain submit` and `cotrain dataset push`: what contributors send. Needs no running stack of one's own."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from feedback.client import Client
from feedback.contracts import FeedbackIn
from flows.cli.output import (
    EXIT_USAGE,
    JsonOption,
    build_form,
    check_text_option,
    explain_errors,
    fail,
    parse_json_option,
    show,
)

PortalUrlOption = Annotated[
    str,
    typer.Option(
        envvar="COTRAIN_PORTAL_URL",
        help="address of the portal; default: this installation's, else port 8800 here",
        show_default=False,
    ),
]
ContributorTokenOption = Annotated[str, typer.Option(envvar="COTRAIN_TOKEN", help="your API token", show_default=False)]
IdempotencyKeyOption = Annotated[
    str | None,
    typer.Option("--idempotency-key", help="repeat a request safely with the same key", callback=check_text_option),
]
DEFAULT_PORTAL_URL = "http://127.0.0.1:8800"

dataset = typer.Typer(no_args_is_help=True, help="Datasets you contribute.")


def add_commands(app: typer.Typer) -> None:
    app.command()(submit)
    app.add_typer(dataset, name="dataset")


def submit(
    prompt: Annotated[str, typer.Option(help="what the model was asked")],
    response: Annotated[str, typer.Option(help="what it answered")],
    model_version: Annotated[str, typer.Option(help="version that answered, as 7 or v7")],
    expected: Annotated[str | None, typer.Option(help="the right answer, for a correction")] = None,
    kind: Annotated[str, typer.Option(help="correction, preference, problem or rating")] = "correction",
    checker: Annotated[str | None, typer.Option(help='JSON of a checker, e.g. {"type": "numeric", "value": 7}')] = None,
    chosen: Annotated[str | None, typer.Option(help="the better answer, for a preference")] = None,
    rejected: Annotated[str | None, typer.Option(help="the worse answer, for a preference")] = None,
    rating: Annotated[int | None, typer.Option(help="1 to 5, for a rating")] = None,
    response_id: Annotated[str | None, typer.Option(help="id of the answer from /v1")] = None,
    url: PortalUrlOption = "",
    token: ContributorTokenOption = "",
    idempotency_key: IdempotencyKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report an answer. Once accepted it becomes a test that every later model takes."""
    fields: dict[str, Any] = {
        "kind": kind,
        "prompt": prompt,
        "response": response,
        "model_version": parse_version_number(model_version),
        "expected": expected,
        "chosen": chosen,
        "rejected": rejected,
        "rating": rating,
        "response_id": response_id,
    }
    if checker is not None:
        fields["checker"] = parse_json_option("--checker", checker)
    report = build_form(FeedbackIn, fields)
    with explain_errors(), Client(url := url or find_portal_url(), token) as client:
        sent = client.submit(report, idempotency_key=idempotency_key)
        text = f"report {sent.id} is {sent.state}; follow it at {url}/api/v1/feedback/{sent.id}"
        show(sent.model_dump(mode="json"), text, as_json)


@dataset.command()
def push(
    file: Annotated[
        Path, typer.Argument(help="JSONL, one row a line: prompt, answer, checker?, ...", exists=True, dir_okay=False)
    ],
    name: Annotated[
        str | None, typer.Option(help="name of the dataset; default: the file's", callback=check_text_option)
    ] = None,
    purpose: Annotated[str, typer.Option(help="mixture; operators also base and suite")] = "mixture",
    url: PortalUrlOption = "",
    token: ContributorTokenOption = "",
    idempotency_key: IdempotencyKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a dataset. One malformed row refuses the file, with every such row's number and reason."""
    if not file.is_file():
        raise fail(f"a dataset is a regular file, and {file} is none; write it to one first", EXIT_USAGE)
    with explain_errors(), Client(url := url or find_portal_url(), token) as client:
        made = client.push_dataset(file, name=name, purpose=purpose, idempotency_key=idempotency_key)
        text = f"dataset {made.id} is {made.state} with {made.num_rows} rows; a round will take it up"
        show(made.model_dump(mode="json"), text, as_json)


def parse_version_number(text: str) -> int:
    """Read 7 or v7."""
    digits = text.removeprefix("v")
    if not re.fullmatch("[0-9]{1,10}", digits):
        raise fail(f"a version is a number such as 7 or v7, got {text!r}", EXIT_USAGE)
    return int(digits)


def find_portal_url() -> str:
    """Return the address of the portal of this home folder, read without the platform's packages."""
    file = Path(os.environ.get("COTRAIN_HOME", ".cotrain")) / "env"
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return DEFAULT_PORTAL_URL
    return next(
        (line.partition("=")[2] for line in lines if line.startswith("COTRAIN_PORTAL_URL=")), DEFAULT_PORTAL_URL
    )
