"""Delete checkpoints from the object store that no later round starts from."""

import logging
from collections.abc import Iterable

from feedback import training_states
from feedback.tables import TrainingState
from flows.context import DispatcherContext
from flows.round.masters import describe_kept
from flows.supervisor.stored_checkpoints import delete_unneeded_objects, parse_stored_manifest, read_stored_manifest
from infra.error_text import SafeMessageError, describe_error
from infra.faults import is_transient_error
from infra.object_store import ObjectStore
from yuan.train.checkpoint_manifest import CHECKPOINT_MANIFEST_FILE, format_checkpoint_name
from yuan.train.file_digest import digest_content

log = logging.getLogger(__name__)

CLEANUP_ACTOR = "dispatcher"


class CheckpointsNotDeleted(SafeMessageError, RuntimeError):
    """Checkpoints of some runs could not be deleted; those of the others were."""


def delete_unneeded_checkpoints(context: DispatcherContext) -> int:
    """Delete what ended rounds leave in the store but the states that are kept; return the number of objects.

    Each end of a state is committed before its objects are deleted, so no round begins to fetch what is deleted. An
    interrupted call is repeated by the next one. It takes as long as there are objects, so it runs in a thread.

    Raises:
        CheckpointsNotDeleted: if a run failed, after all others are done.
    """
    problems = _record_states_of_older_releases(context)
    with context.sessions.begin() as session:
        training_states.end_unneeded_states(session, CLEANUP_ACTOR)
    with context.sessions() as session:
        states = training_states.list_uncleared_states(session)

    num_deleted = 0
    for state in states:
        try:
            num_deleted += _delete_checkpoints_of_run(context, state)
        except Exception as error:  # of one run: the others are deleted
            if is_transient_error(error):
                raise
            problems.append(f"run {state.run_id}: {describe_error(error)}")
    if num_deleted:
        log.info("deleted %d objects of checkpoints of %d runs", num_deleted, len(states))
    if problems:
        raise CheckpointsNotDeleted(f"checkpoints of {len(problems)} runs were not deleted; {problems[0]}")
    return num_deleted


def _delete_checkpoints_of_run(context: DispatcherContext, state: TrainingState) -> int:
    """Delete the objects of one run, with all of a kept checkpoint whose manifest is damaged; return their number.

    A state whose manifest is not the recorded one can start no round. So it is ended, which `cotrain doctor` shows, and
    only the next call deletes what is left of it.
    """
    is_kept = state.end_reason is None and state.step is not None
    kept_name = format_checkpoint_name(state.step) if is_kept and state.step is not None else None
    kept_files: Iterable[str] = ()
    if kept_name is not None:
        try:
            kept_files = read_kept_files(context.objects, state, kept_name)
        except ValueError as error:
            with context.sessions.begin() as session:
                reason = f"are damaged in the store: {error}"
                training_states.end_training_state(session, state.run_id, reason, CLEANUP_ACTOR)
            return 0
    num_objects = delete_unneeded_objects(context.objects, state.run_id, kept_name, kept_files)
    with context.sessions.begin() as session:
        if num_objects:
            training_states.record_deletion(session, state, num_objects, CLEANUP_ACTOR)
        else:
            training_states.mark_cleared(session, state)
    return num_objects


def read_kept_files(objects: ObjectStore, state: TrainingState, name: str) -> list[str]:
    """Return the names of the files of a kept checkpoint, its manifest among them.

    Raises:
        ValueError: if the manifest is missing, damaged, or not the recorded one.
    """
    content = read_stored_manifest(objects, state.run_id, name)
    if content is None:
        raise ValueError(f"{CHECKPOINT_MANIFEST_FILE} is missing")
    if digest_content(content).sha256 != state.manifest_sha256:
        raise ValueError(f"{CHECKPOINT_MANIFEST_FILE} differs from the record")
    files = parse_stored_manifest(content, name).list_files(with_moments=state.has_moments)
    return [CHECKPOINT_MANIFEST_FILE, *files]


def _record_states_of_older_releases(context: DispatcherContext) -> list[str]:
    """Record the states of versions in use that a release without such records registered; return what failed."""
    problems: list[str] = []
    with context.sessions() as session:
        unrecorded = training_states.list_unrecorded_runs(session)
    for run_id, step in unrecorded:
        name = format_checkpoint_name(step)
        try:
            content = read_stored_manifest(context.objects, run_id, name)
        except Exception as error:  # of one run: the others are recorded
            if is_transient_error(error):
                raise
            problems.append(f"run {run_id}: {describe_error(error)}")
            continue
        with context.sessions.begin() as session:
            try:
                if content is None:
                    raise ValueError("it has no manifest in the store")
                kept = describe_kept(content, name, with_moments=True)
            except ValueError as error:
                reason = f"{training_states.NEVER_STORED_REASON}: {error}"
                training_states.end_training_state(session, run_id, reason, CLEANUP_ACTOR)
            else:
                training_states.record_training_state(session, run_id, kept)
    return problems
