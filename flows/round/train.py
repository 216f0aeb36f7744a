"""Train a round's candidate, with its parent held in the cache."""

from feedback import rounds
from flows.context import Context
from flows.round.run_model import hold_parent
from flows.supervisor.run_reporter import ProgressCallback
from flows.supervisor.supervisor import train_candidate
from yuan.train.run_folder import RunFolder


def train_round(context: Context, round_id: str, progress: ProgressCallback) -> None:
    """Run a round's training until its weights are exported.

    Raises:
        VersionLost: if the parent is lost from the cache, the registry and its run.
        Exception: as `train_candidate`.
    """
    with context.sessions.begin() as session:
        run_id = rounds.get_or_create_training_run(session, round_id).id
    with hold_parent(context, RunFolder(context.runs / run_id)) as parent_folders:
        train_candidate(context, round_id, progress, parent_folders)
