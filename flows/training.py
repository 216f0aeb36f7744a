"""What is left of a run when it has trained: its registration as a version."""

import json
import logging
from pathlib import Path

from feedback import rounds
from flows.context import Context

log = logging.getLogger(__name__)


def register(context: Context, round_id: str) -> int:
    """Register the exported folder as a new version; the same run keeps its version."""
    with context.sessions() as session:
        run = rounds.training_run(session, round_id)
        run_id, mlflow_run = run.id, str(run.mlflow_run_id)
    export: Path = context.runs / run_id / "export"
    manifest = json.loads((export / "manifest.json").read_text())
    version = context.tracker.register(mlflow_run, export, {"cotrain.round": round_id, "cotrain.run": run_id})
    context.tracker.end_run(mlflow_run)
    with context.sessions.begin() as session:
        rounds.add_version(session, round_id, version, manifest)
    log.info("registered v%d from run %s", version, run_id)
    return version
