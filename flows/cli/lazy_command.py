"""Commands whose module is imported when they run or show their help, so that `cotrain --help` loads none of them."""

import importlib
from typing import Any

import typer
from typer.core import TyperCommand
from typer.main import get_group


class LazyCommand(TyperCommand):
    """Stand for a command, or a group of commands, that another module defines.

    Args:
        place: module below `flows.cli`, and name of its function or `typer.Typer` there, as `plan:plan`.
        help: the first paragraph of the command's own help, for the list of commands.
    """

    def __init__(self, name: str, place: str, help: str) -> None:
        super().__init__(name, help=help)
        self._module, _, self._attribute = place.partition(":")

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Return the context of the command itself, in which the calling group runs it."""
        return self.load().make_context(*arguments, **options)

    def load(self) -> TyperCommand:
        """Import the command."""
        definition = getattr(importlib.import_module(f"flows.cli.{self._module}"), self._attribute)
        app = typer.Typer()
        if isinstance(definition, typer.Typer):
            app.add_typer(definition, name=self.name)
        else:
            app.command(self.name)(definition)
        command: TyperCommand = get_group(app).commands[str(self.name)]  # type: ignore[assignment]
        return command
