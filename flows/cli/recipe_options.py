"""The option `--set` of commands that take a recipe."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from yuan.data.text import make_printable
from yuan.toml_text import NotToml, parse_toml

ReplaceOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="SECTION.KEY=VALUE, another value for the recipe; may be repeated"),
]


def parse_replacements(replacements: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the values of options `--set`, by section and key; a value that is not TOML is a text.

    Raises:
        BadParameter: if one is not `SECTION.KEY=VALUE`, or names what another one names: exit status 2.

    >>> parse_replacements(["schedule.kind=wsd", "length.epochs=2.5", "data.isolate_documents=false"])
    {'schedule': {'kind': 'wsd'}, 'length': {'epochs': 2.5}, 'data': {'isolate_documents': False}}
    """
    overrides: dict[str, dict[str, Any]] = {}
    for replacement in replacements:
        place, equals, text = replacement.partition("=")
        section, dot, key = place.partition(".")
        if not (equals and dot):
            raise typer.BadParameter(f"must be SECTION.KEY=VALUE, got {make_printable(replacement, 60)!r}")
        values = overrides.setdefault(section, {})
        if key in values:
            raise typer.BadParameter(f"must name each value once, got {make_printable(place, 60)!r} twice")
        try:
            values[key] = parse_toml(f"value = {text}".encode(errors="surrogateescape"))["value"]
        except (NotToml, KeyError):
            values[key] = text
        except ValueError as error:
            raise typer.BadParameter(f"{make_printable(place, 60)}: {error}") from None
    return overrides
