"""`cotrain register`: bring back a version that was deleted from the registry."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.model import open_installation
from flows.cli.output import EXIT_USAGE, JsonOption, explain_errors, fail, show


def add_commands(app: typer.Typer) -> None:
    app.command()(register)


def register(
    folder: Annotated[
        Path, typer.Argument(help="runs/RUN/export, or another copy of the model folder", exists=True, file_okay=False)
    ],
    version: Annotated[str, typer.Option(help="7 or v7; default: the version whose run or manifest it is")] = "",
    as_json: JsonOption = False,
) -> None:
    """Register a version again that somebody deleted from the registry, or its files; it keeps its number here.

    MLflow gives it another number of its own, with the tag `cotrain.version`; its aliases follow within seconds.
    """
    number = version.removeprefix("v")
    if number and not number.isdecimal():
        raise fail(f"a version is written 7 or v7, got {version!r}", EXIT_USAGE)
    with explain_errors():
        context = open_installation()
        from flows.round.versions import register_again

        found, is_new = register_again(context, folder, int(number) if number else None)
        text = f"v{found} is in the registry again" if is_new else f"v{found} is in the registry; nothing was changed"
        show({"version": found, "registered": is_new}, text, as_json)
