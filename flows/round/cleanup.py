"""Remove what the retention policy keeps no longer: at the end of a round, and by `cotrain cleanup`.

The dispatcher removes stored checkpoints itself: `flows.dispatcher.checkpoint_cleanup`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from feedback import rounds
from feedback.accounts import audit
from feedback.retention import ExpiredRecords, find_expired_records
from flows.context import Context
from flows.disk_history import record_disk_usage
from flows.retention_policy import RetentionPolicy, read_retention_policy
from infra.error_text import describe_error
from infra.folder_cache import measure_folder
from yuan.model.model_manifest import MODEL_MANIFEST_FILE
from yuan.safe_files import remove_entry

log = logging.getLogger(__name__)

MAX_UPLOAD_AGE_S = 24 * 3600.0  # of an interrupted upload that nothing resumes
RUN_WORK_FOLDERS = {
    "checkpoints": "checkpoints",
    "token files": "data",
    "validation files": "validation",
    "parent's masters": "parent_state",  # of a run that failed or was cancelled
}
RUN_SCRATCH_PREFIXES = (".parent-state-", ".fetch-")  # of folders beside a run's, which a killed transfer left


@dataclass(frozen=True)
class Removal:
    """Files that a policy removes.

    Attributes:
        subject: the run's id, or the version.
        files: what they are.
        remove: removes them; may be repeated.
    """

    subject: str
    files: str
    num_bytes: int
    remove: Callable[[], None] = field(repr=False, compare=False)

    def to_row(self) -> dict[str, str | int]:
        return {"subject": self.subject, "files": self.files, "bytes": self.num_bytes}


def clean_up_after_round(context: Context, round_id: str) -> list[dict[str, str | int]]:
    """Remove expired files, record the disk's usage, and return what was removed; no error fails the round."""
    try:
        removed = remove_expired(context, list_removals(context), "round")
        context.tracker.transfer.abort_old_uploads(MAX_UPLOAD_AGE_S)
        context.versions.folders.evict()
    except Exception as error:  # of any kind: the round has its outcome, and the next one cleans up again
        log.warning("expired files were not removed: %s", describe_error(error))
        removed = []
    with context.sessions() as session:
        number = rounds.find_round(session, round_id).number
    try:
        record_disk_usage(context.settings.home, number)
    except OSError as error:
        log.warning("the disk's usage was not recorded: %s", error)
    return [removal.to_row() for removal in removed]


def list_removals(context: Context, policy: RetentionPolicy | None = None) -> list[Removal]:
    """List the files that the policy of the home folder keeps no longer, with their sizes.

    Raises:
        ValueError: if the policy cannot be read.
    """
    policy = policy or read_retention_policy(context.settings.home)
    with context.sessions() as session:
        expired = find_expired_records(
            session,
            keep_rounds=policy.runs.keep_rounds,
            keep_rounds_of_losers=policy.versions.keep_rounds_of_losers,
        )
    return [*_list_run_removals(context, expired), *_list_version_removals(context, expired)]


def remove_expired(context: Context, removals: Iterable[Removal], actor: str) -> list[Removal]:
    """Remove files and audit each removal; one that fails is logged and listed again the next time."""
    removed = []
    for removal in removals:
        try:
            removal.remove()
        except Exception as error:  # of one removal: the others continue
            log.warning("%s of %s were not removed: %s", removal.files, removal.subject, describe_error(error))
            continue
        with context.sessions.begin() as session:
            audit(session, actor, "removed", removal.subject, files=removal.files, bytes=removal.num_bytes)
        log.info("removed %s of %s, %d bytes", removal.files, removal.subject, removal.num_bytes)
        removed.append(removal)
    return removed


def _list_run_removals(context: Context, expired: ExpiredRecords) -> Iterator[Removal]:
    for run_id, version in expired.runs.items():
        for files, name in RUN_WORK_FOLDERS.items():
            yield from _list_folder_removal(context.runs, run_id, f"{run_id}/{name}", files)
        for prefix in RUN_SCRATCH_PREFIXES:
            yield from _list_folder_removal(context.runs, run_id, f"{prefix}{run_id}", "interrupted transfers")
        exports = list(_list_folder_removal(context.runs, run_id, f"{run_id}/export", "exported weights"))
        if exports and _has_other_copy(context, version, expired):  # the registry is asked only about what is there
            yield from exports


def _list_folder_removal(runs: Path, run_id: str, path: str, files: str) -> Iterator[Removal]:
    folder = runs / path
    if folder.is_dir() or folder.is_symlink():
        num_bytes = 0 if folder.is_symlink() else measure_folder(folder)
        yield Removal(run_id, files, num_bytes, lambda: remove_entry(runs, path))


def _has_other_copy(context: Context, version: int | None, expired: ExpiredRecords) -> bool:
    """Return True if a run's export is not the last copy of a version that is kept."""
    if version is None or version in expired.versions:
        return True
    with context.sessions() as session:
        names = [*rounds.find_version(session, version).manifest.get("files", ()), MODEL_MANIFEST_FILE]
    return context.tracker.has_version(version) and not context.tracker.find_missing_files(version, names)


def _list_version_removals(context: Context, expired: ExpiredRecords) -> Iterator[Removal]:
    for version, names in expired.versions.items():
        if not context.tracker.has_version(version):
            continue
        sizes = context.tracker.read_file_sizes(version)
        weights = [name for name in names if sizes.get(name)]
        if weights:
            num_bytes = sum(sizes[name] for name in weights)
            yield Removal(
                f"v{version}", "registered files", num_bytes, _make_version_removal(context, version, weights)
            )


def _make_version_removal(context: Context, version: int, names: list[str]) -> Callable[[], None]:
    return lambda: context.tracker.delete_files(version, names)
