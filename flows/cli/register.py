"""`cotrain register`: restore a version that was deleted from the registry."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.output import JsonOption, read_version_option, show
from flows.context import open_operator_context
from flows.round.versions import restore_version


def register(
    folder: Annotated[
        Path, typer.Argument(help="runs/RUN/export, or another copy of the model folder", exists=True, file_okay=False)
    ],
    version: Annotated[
        str, typer.Option(help="7 or v7; default: the version that the run or the manifest belongs to")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Restore a version, or its files, that was deleted from the registry; it keeps its number in the platform.

    MLflow assigns its own new number, with the tag `cotrain.version`; the aliases are updated within seconds.
    """
    number = read_version_option("--version", version) if version else None
    restored = restore_version(open_operator_context(), folder, number)
    outcome = " again" if restored.was_missing else "; nothing changed"
    text = f"v{restored.version} is in the registry{outcome}"
    show({"version": restored.version, "registered": restored.was_missing}, text, as_json)
