"""Classify the exit of a run's processes, from the ranks' exit notes, their heartbeats and the launcher's status."""

import time
from dataclasses import dataclass, replace
from typing import Literal

from infra.launchers.job import HOST_NAME_PATTERN, JobEnding, JobEndingCause
from yuan.data.text import make_printable
from yuan.safe_files import NotRegularFileError, read_file_end
from yuan.train.exit_status import ExitNote, ExitStatus, read_exit_notes
from yuan.train.heartbeat import read_heartbeats
from yuan.train.run_folder import RunFolder

ExitKind = Literal[
    "finished",
    "out of memory",
    "bad data",
    "numerical",
    "lost device",
    "hung",
    "disk full",
    "preempted",
    "cancelled",
    "unknown",
]

EXIT_KIND_BY_CAUSE: dict[JobEndingCause, ExitKind] = {
    "preempted": "preempted",
    "node lost": "lost device",
    "out of memory": "out of memory",
    "cancelled": "cancelled",
}
# By a rank's own exit status, the root cause first: a lost device makes the other ranks hang or lose their peer.
EXIT_KIND_BY_RANK_STATUS: dict[ExitStatus, ExitKind] = {
    ExitStatus.DEVICE_LOST: "lost device",
    ExitStatus.OUT_OF_MEMORY: "out of memory",
    ExitStatus.DISK_FULL: "disk full",
    ExitStatus.NUMERICAL: "numerical",
    ExitStatus.BAD_DATA: "bad data",
    ExitStatus.HUNG: "hung",
}
RANK_HEARTBEAT_TIMEOUT_S = 4.0  # a rank writes a heartbeat every second
RANK_EXIT_GRACE_S = 3.0  # time for ranks to exit by themselves
LOG_TAIL_CHARACTERS = 800
LOG_TAIL_BYTES = 4 * LOG_TAIL_CHARACTERS
MAX_REASON_CHARACTERS = 3000


@dataclass(frozen=True, kw_only=True)
class RunEnding:
    """The class and reason of a run's end, and the rank that failed first and its host if they are known.

    The reason may quote output of ranks; its lines are made printable here, since it goes to logs and web pages.
    """

    kind: ExitKind
    reason: str
    rank: int | None = None
    host: str | None = None

    def __post_init__(self) -> None:
        lines = self.reason[:MAX_REASON_CHARACTERS].split("\n")
        object.__setattr__(self, "reason", "\n".join(make_printable(line, MAX_REASON_CHARACTERS) for line in lines))


def classify(folder: RunFolder, ending: JobEnding, since: float) -> RunEnding:
    """Classify the ending of a job that was started at `since`, in seconds since the epoch."""
    if folder.is_finished:
        return RunEnding(kind="finished", reason="the weights are exported")
    # The launcher knows best, except for a kill by the OOM killer, which may have hit other processes of the host.
    launcher_report = RunEnding(kind="unknown", reason=ending.message or f"the launcher reports: {ending.cause}")
    if ending.cause is not None and ending.cause != "out of memory":
        return replace(launcher_report, kind=EXIT_KIND_BY_CAUSE[ending.cause])

    # A rank's own status, by priority; a hang counts less than the OOM kill that may have caused it.
    notes = read_exit_notes(folder.path, since)
    for status, kind in EXIT_KIND_BY_RANK_STATUS.items():
        if status == ExitStatus.HUNG and ending.cause == "out of memory":
            return replace(launcher_report, kind="out of memory")
        note = next((note for note in notes if note.status == status), None)
        if note is not None:
            return _classify_note(folder, kind, note, since)

    errors = [note for note in notes if note.status == ExitStatus.UNKNOWN]
    if errors:
        return RunEnding(kind="unknown", reason=f"rank {errors[0].rank}: {errors[0].message}", rank=errors[0].rank)

    # No rank left a note: the one whose heartbeat stopped first was killed.
    silent_ranks = _find_silent_ranks(folder, since, time.time())
    prefix = f"rank {silent_ranks[0]} was killed or its machine is lost; " if len(silent_ranks) == 1 else ""
    reason = f"{prefix}status {ending.status}; {read_log_tail(folder)}"
    return RunEnding(kind="unknown", reason=reason, rank=_get_single_rank(silent_ranks))


def has_hung_rank(folder: RunFolder, since: float) -> bool:
    """Check whether a rank exited for lack of progress more than RANK_EXIT_GRACE_S ago; the others then hang too."""
    return any(
        note.status == ExitStatus.HUNG and time.time() - note.time > RANK_EXIT_GRACE_S
        for note in read_exit_notes(folder.path, since)
    )


def read_log_tail(folder: RunFolder) -> str:
    """Return the last lines of the processes' output."""
    try:
        return read_file_end(folder.path, "train.log", LOG_TAIL_BYTES).decode(errors="replace")[-LOG_TAIL_CHARACTERS:]
    except FileNotFoundError:
        return "no log"
    except NotRegularFileError as error:
        return f"the log {error.strerror}"


def _classify_note(folder: RunFolder, kind: ExitKind, note: ExitNote, since: float) -> RunEnding:
    if kind != "hung":
        host = note.host if HOST_NAME_PATTERN.fullmatch(note.host) else None  # it is written into a batch script
        return RunEnding(kind=kind, reason=f"rank {note.rank}: {note.message}", rank=note.rank, host=host)
    silent_ranks = _find_silent_ranks(folder, since, note.time)
    liveness = (
        f"without heartbeat: rank {', '.join(map(str, silent_ranks))}" if silent_ranks else "all ranks were alive"
    )
    reason = f"rank {note.rank}: {note.message}; {liveness}"
    return RunEnding(kind=kind, reason=reason, rank=_get_single_rank(silent_ranks))


def _find_silent_ranks(folder: RunFolder, since: float, at: float) -> list[int]:
    """Return the ranks without a heartbeat for RANK_HEARTBEAT_TIMEOUT_S at a time, which were stopped or had exited."""
    times = {rank: beat["time"] for rank, beat in read_heartbeats(folder.path).items() if beat["time"] >= since}
    newest = max(times.values(), default=at)
    return [rank for rank, last in times.items() if min(newest, at) - last > RANK_HEARTBEAT_TIMEOUT_S]


def _get_single_rank(ranks: list[int]) -> int | None:
    return ranks[0] if len(ranks) == 1 else None
