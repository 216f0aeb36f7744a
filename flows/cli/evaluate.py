"""`cotrain evaluate`: evaluate a version on the cases that it has no result for."""

import sys
import time
from typing import Annotated

import typer

from feedback.gate import compute_pass_rates
from flows.cli.output import PROGRESS_INTERVAL_S, JsonOption, check_version, note_alias, show
from flows.context import open_operator_context
from flows.model_folders import resolve_version
from flows.round.evaluate import evaluate_version
from flows.round.evaluation_process import EvaluationProgress


class EvaluationLines:
    """Print the progress of an evaluation on stderr: every few seconds, when its place in the queue changes, and at its
    end.
    """

    def __init__(self) -> None:
        self._printed_at = time.monotonic()
        self._num_leases_ahead: int | None = None

    def __call__(self, progress: EvaluationProgress) -> None:
        now = time.monotonic()
        has_moved = progress.num_leases_ahead != self._num_leases_ahead
        if has_moved or now - self._printed_at >= PROGRESS_INTERVAL_S or progress.num_done == progress.num_cases:
            self._printed_at, self._num_leases_ahead = now, progress.num_leases_ahead
            print(progress.describe(), file=sys.stderr)


def evaluate(
    version: Annotated[str, typer.Argument(help="7, v7 or an alias", metavar="VERSION", callback=check_version)],
    as_json: JsonOption = False,
) -> None:
    """Evaluate a version on every case that it has no result for, and show its pass rates."""
    with note_alias(version):
        context = open_operator_context()
    number = resolve_version(context.tracker, version)
    evaluate_version(context, number, report=EvaluationLines())
    with context.sessions() as session:
        pass_rates = compute_pass_rates(session, number)

    lines = [f"v{number}"]
    for suite, pass_rate in pass_rates.items():
        low, high = pass_rate.interval
        lines.append(f"{suite:28} {pass_rate.rate:.3f}  [{low:.3f}, {high:.3f}]  of {pass_rate.total}")
    suites = {suite: pass_rate.model_dump(mode="json") for suite, pass_rate in pass_rates.items()}
    show({"version": number, "suites": suites}, "\n".join(lines), as_json)
