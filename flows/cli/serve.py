"""`cotrain serve`: run the model server."""

from typing import Annotated

import typer

from infra.settings import ModelServerSettings, load_settings
from yuan.serve.run import DEFAULT_ALIAS, run_model_server


def serve(alias: Annotated[str, typer.Option(help="registry alias whose version is served")] = DEFAULT_ALIAS) -> None:
    """Run the internal model server in the foreground, at the URL from the settings."""
    settings = load_settings(ModelServerSettings)
    run_model_server(settings, alias)
