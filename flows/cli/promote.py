"""`cotrain promote`: make a registered version the champion if it passes the gate."""

from typing import Annotated

import typer

from flows.cli.output import JsonOption, check_version, note_alias, show
from flows.context import open_operator_context
from flows.model_folders import resolve_version
from flows.operator_promotion import promote_version


def promote(
    version: Annotated[str, typer.Argument(help="7, v7 or an alias", metavar="VERSION", callback=check_version)],
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion if it passes the gate, with the rules of a round; rerun to continue after a kill.

    It and the champion are evaluated on the cases that they have no result for. Not while a round runs.
    """
    with note_alias(version):
        context = open_operator_context()
    promotion = promote_version(context, resolve_version(context.tracker, version))
    decision = promotion.decision
    fields = {
        "version": promotion.version,
        "promoted": decision is not None,
        "previous": None if decision is None else decision.champion,
        "decision": None if decision is None else decision.model_dump(mode="json"),
    }
    if decision is None:
        return show(fields, f"v{promotion.version} is the champion already", as_json)
    lines = [f"v{promotion.version} is the champion; before: {_name(decision.champion)}"]
    for suite in decision.suites:
        before = "      " if suite.before is None else f"{suite.before.rate:.3f} "
        lines.append(f"{suite.suite:28} {before}→ {suite.after.rate:.3f} of {suite.after.total}")
    lines.append("next: cotrain status")
    show(fields, "\n".join(lines), as_json)


def _name(version: int | None) -> str:
    return "none" if version is None else f"v{version}"
