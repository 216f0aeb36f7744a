"""`cotrain cleanup`: remove files that the retention policy keeps no longer."""

from typing import Annotated

import typer

from flows.cli.output import JsonOption, show
from flows.context import open_operator_context
from flows.round.cleanup import list_removals, remove_expired


def cleanup(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the files and remove nothing")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove files that the retention policy keeps no longer, as every round does at its end.

    The policy is `$COTRAIN_HOME/retention.toml`; docs/operators.md has its keys and defaults.
    """
    context = open_operator_context()
    removals = list_removals(context)
    if not dry_run:
        removals = remove_expired(context, removals, "operator")
    lines = [f"{removal.num_bytes:>18,} bytes  {removal.files} of {removal.subject}" for removal in removals]
    total = sum(removal.num_bytes for removal in removals)
    lines.append(f"{'would remove' if dry_run else 'removed'} {total:,} bytes")
    content = {"dry_run": dry_run, "bytes": total, "removed": [removal.to_row() for removal in removals]}
    show(content, "\n".join(lines), as_json)
