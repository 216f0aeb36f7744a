"""`cotrain recipe list | show | check`: the recipes by which rounds train."""

import re
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.cli.output import EXIT_FAILED, JsonOption, show, show_table
from flows.cli.recipe_options import ReplaceOption, parse_replacements
from flows.recipe_files import find_misnamed_recipes, find_recipe_file, find_recipe_files, load_recipe
from infra.settings import get_home_folder
from yuan.data.text import make_printable
from yuan.recipe import Recipe, parse_recipe


def check_snapshot_id(value: str | None) -> str | None:
    """Reject a malformed id, since it becomes part of a key of the object store: exit status 2."""
    if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
        raise typer.BadParameter(
            f"must be 64 hexadecimal digits, got {make_printable(value)!r}; `cotrain round status --json` has it"
        )
    return value


recipe = typer.Typer(no_args_is_help=True, help="Show the recipes by which rounds train.")

RecipeNameArgument = Annotated[str, typer.Argument(help="name of a recipe, as `cotrain recipe list` shows it")]


@recipe.command(name="list")
def list_(as_json: JsonOption = False) -> None:
    """List the shipped recipes and those in `$COTRAIN_HOME/recipes`. A file that breaks a rule is listed with it."""
    home = get_home_folder()
    rows: list[dict[str, Any]] = []
    for file in find_recipe_files(home):
        row: dict[str, Any] = {"name": file.name, "file": str(file.path), "shipped": not file.is_custom}
        try:
            values = parse_recipe(file.read(), file.name)
        except ValueError as error:
            row["error"] = str(error)
        else:
            row |= {"kind": values.run.kind, "preset": values.model.preset, "description": values.run.description}
        rows.append(row)
    for path, reason in find_misnamed_recipes(home).items():
        rows.append({"name": "-", "file": path, "shipped": False, "error": reason})
    if as_json:
        show({"recipes": rows}, "", as_json)
        return
    table = Table("name", "kind", "model", "description", box=None, pad_edge=False)
    for row in rows:
        origin = "" if row["shipped"] else f" ({row['file']})"
        table.add_row(
            row["name"],
            row.get("kind", "-"),
            row.get("preset", "-"),
            f"{row.get('description') or row['error']}{origin}",
        )
    show_table(table)


@recipe.command(name="show")
def show_(
    name: RecipeNameArgument,
    toml: Annotated[bool, typer.Option("--toml", help="print the file itself, to begin a recipe of your own")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every value of a recipe, with its source or its meaning."""
    home = get_home_folder()
    if toml:
        print(find_recipe_file(home, name).read().decode(errors="replace"), end="")
        return
    values = load_recipe(home, name)
    show({"name": name, "recipe": values.to_json()}, format_recipe(name, values), as_json)


@recipe.command()
def check(
    name: RecipeNameArgument,
    pool: Annotated[
        str | None, typer.Option(help="FILE[:NAME] of a pool; default: the pool that rounds are planned for")
    ] = None,
    snapshot: Annotated[
        str | None,
        typer.Option(
            help="id of a snapshot to read; default: data for the recipe's target number of steps",
            callback=check_snapshot_id,
        ),
    ] = None,
    replace: ReplaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run by a recipe needs on a pool: memory, disk, transfers and time. Exit status 1 if it does not fit.

    Nothing is started. The stack must be up for --snapshot, and for a recipe whose preset is the parent.
    """
    # These need numpy, which the other commands do not.
    from flows.cli.recipe_check import estimate_round
    from flows.cli.recipe_table import format_estimate
    from yuan.plan.json_fields import escape_text
    from yuan.recipe_resolution import RecipeUnfit

    try:
        estimate = estimate_round(name, parse_replacements(replace or ()), pool, snapshot)
    except RecipeUnfit as error:
        report = {"recipe": name, "fits": False, "problems": [str(error)], "notes": []}
        show(report, f"{escape_text(name)}: does not fit\nproblem: {escape_text(str(error))}", as_json)
        raise typer.Exit(EXIT_FAILED) from None
    show(estimate.to_json(), format_estimate(estimate), as_json)
    if not estimate.fits:
        raise typer.Exit(EXIT_FAILED)


def format_recipe(name: str, values: Recipe) -> str:
    """Return a recipe as one line per value: the value, and its source, or what it means."""
    lines = [f"{name}: {values.run.description}"]
    lines += [f"  not implemented: {setting}" for setting in values.run.not_implemented]
    for section in Recipe.model_fields:
        if section in ("run", "sources"):
            continue
        lines.append(f"[{section}]")
        table = getattr(values, section)
        for key, field in type(table).model_fields.items():
            value = getattr(table, key)
            source = values.sources.get(f"{section}.{key}")
            note = f"{field.description}" + (f" [{source}]" if source else "")
            lines.append(f"  {key:<22} {'-' if value is None else _format_value(value):<12} {note}")
    return "\n".join(lines)


def _format_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else str(value)
