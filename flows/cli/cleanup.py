"""`cotrain cleanup`: remove files that the retention policy keeps no longer."""

from typing import Annotated

import typer

from flows.cli.output import EXIT_FAILED, JsonOption, show
from flows.context import open_context
from flows.retention_policy import read_retention_policy
from flows.round.cleanup import list_expired, remove_expired
from infra.settings import Settings


def cleanup(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the files and remove nothing")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove files that the retention policy keeps no longer, as every round does at its end.

    What cannot be cleaned is named, stops nothing else, and makes the exit status 1.

    The policy is `$COTRAIN_HOME/retention.toml`; docs/operators.md has its keys and defaults.
    """
    context = open_context(Settings)
    with context.sessions() as session:
        session.connection()  # the other servers are asked area by area
    if dry_run:
        report = list_expired(context)
    else:
        read_retention_policy(context.settings.home)  # a wrong one is a usage error
        report = remove_expired(context, "operator")
    lines = [f"{removal.num_bytes:>18,} bytes  {removal.files} of {removal.subject}" for removal in report.removals]
    lines.append(f"{'would remove' if dry_run else 'removed'} {report.num_bytes:,} bytes")
    lines += [f"not cleaned: {area}: {problem}" for area, problem in report.problems.items()]
    rows = [removal.to_row() for removal in report.removals]
    content = {"dry_run": dry_run, "bytes": report.num_bytes, "removed": rows, "problems": report.problems}
    show(content, "\n".join(lines), as_json)
    if report.problems:
        raise typer.Exit(EXIT_FAILED)
