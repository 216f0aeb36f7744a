"""Delete checkpoints from the object store that no later round starts from."""

import logging

from feedback import training_states
from flows.context import DispatcherContext
from flows.round.masters import describe_kept
from flows.supervisor.stored_checkpoints import delete_unneeded_objects, read_stored_manifest
from yuan.train.checkpoint_manifest import format_checkpoint_name

log = logging.getLogger(__name__)

CLEANUP_ACTOR = "dispatcher"


def delete_unneeded_checkpoints(context: DispatcherContext) -> int:
    """Delete what ended rounds leave in the store but the states that are kept; return the number of objects.

    Each end of a state is committed before its objects are deleted, so no round begins to fetch what is deleted. An
    interrupted call is repeated by the next one.
    """
    _record_states_of_older_releases(context)
    with context.sessions.begin() as session:
        training_states.end_unneeded_states(session, CLEANUP_ACTOR)
    with context.sessions() as session:
        states = training_states.list_uncleared_states(session)

    num_deleted = 0
    for state in states:
        is_kept = state.end_reason is None and state.step is not None
        kept_name = format_checkpoint_name(state.step) if is_kept and state.step is not None else None
        num_objects = delete_unneeded_objects(context.objects, state.run_id, kept_name, with_moments=state.has_moments)
        with context.sessions.begin() as session:
            if num_objects:
                training_states.record_deletion(session, state, num_objects, CLEANUP_ACTOR)
            else:
                training_states.mark_cleared(session, state)
        num_deleted += num_objects
    if num_deleted:
        log.info("deleted %d objects of checkpoints of %d runs", num_deleted, len(states))
    return num_deleted


def _record_states_of_older_releases(context: DispatcherContext) -> None:
    """Record the states of versions in use that a release without such records registered."""
    with context.sessions() as session:
        unrecorded = training_states.list_unrecorded_runs(session)
    for run_id, step in unrecorded:
        name = format_checkpoint_name(step)
        content = read_stored_manifest(context.objects, run_id, name)
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
